// Which instruction set a translation unit is built for, and the decorations that follow from it.
// The build passes -DGATEWISE_ARCH=<name>; everything such a unit compiles lives in gatewise::<name>,
// so that the linker can never run one CPU's code on another.
#pragma once

#ifndef GATEWISE_ARCH
#define GATEWISE_ARCH scalar  // plain C++: tests, tools
#endif

#ifdef __CUDACC__
#define GATEWISE_FN __host__ __device__ __forceinline__
#else
#define GATEWISE_FN inline __attribute__((always_inline))
#endif
