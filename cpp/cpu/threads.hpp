// A team of threads that runs one kernel call together: the caller is thread 0, the others are lent by a
// process-wide pool, or OpenMP's (share_openmp), for the length of the call. Calls from several threads get teams of
// their own.
#pragma once

namespace gatewise {

class Team {
 public:
  explicit Team(int size) : size(size) {}
  void barrier();  // returns when all have arrived, and makes what each wrote visible to all

  const int size;

 private:
  int arrived_ = 0, generation_ = 0;
};

// Calls job(context, team, id) for id in 0..size-1 on as many threads, and returns when all have. The team may
// be smaller than asked for when the system refuses another thread.
void run_team(int size, void (*job)(const void* context, Team& team, int id), const void* context);

}  // namespace gatewise
