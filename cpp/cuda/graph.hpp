// Calls of the library recorded once, to be launched again as one. A layer run step by step is two launches or more a
// step, which take the host some microseconds each; a graph takes it one. It is the caller's object and not a cache of
// the library's, for it holds what the library never keeps: the pointers of its calls, the lengths that they were given
// and the seed of a zoneout. While all of these stay, and the numbers behind the pointers change, it can be launched.
#pragma once
#include "runtime.hpp"

namespace gatewise::cuda {

class Graph {
 public:
  Graph() = default;
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  ~Graph() {
    if (executable_) cudaGraphExecDestroy(executable_);
  }

  // calls(stream) enqueues work on the stream and does not wait for it. None of it runs.
  template <class F> void record(F calls) {
    Recording recording;
    calls(recording.stream);
    GATEWISE_CUDA_CHECK(recording.end());
    cudaGraphExec_t executable = nullptr;
    GATEWISE_CUDA_CHECK(cudaGraphInstantiate(&executable, recording.graph, 0));
    if (executable_) GATEWISE_CUDA_CHECK(cudaGraphExecDestroy(executable_));
    executable_ = executable;
  }
  void launch(cudaStream_t stream) const { GATEWISE_CUDA_CHECK(cudaGraphLaunch(executable_, stream)); }

 private:
  // A stream of its own, captured until the end, also where a call throws
  struct Recording {
    cudaStream_t stream = nullptr;
    cudaGraph_t graph = nullptr;
    bool open = false;

    Recording() {
      GATEWISE_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
      const cudaError_t begun = cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal);
      open = begun == cudaSuccess;
      if (!open) cudaStreamDestroy(stream);
      GATEWISE_CUDA_CHECK(begun);
    }
    Recording(const Recording&) = delete;
    ~Recording() {
      if (open) end();
      if (graph) cudaGraphDestroy(graph);
      cudaStreamDestroy(stream);
    }
    cudaError_t end() {
      open = false;
      return cudaStreamEndCapture(stream, &graph);
    }
  };

  cudaGraphExec_t executable_ = nullptr;
};

}  // namespace gatewise::cuda
