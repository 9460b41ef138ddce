// Runs tasks on several threads.
//
// Inside a PyTorch process the tasks run on the OpenMP runtime PyTorch has loaded, found by symbol,
// so that both share one pool: two pools would spin against each other on the same cores. Elsewhere
// a pool of std::threads serves.
#pragma once
#include <functional>

namespace sk {

// Calls body(i) for each i in [0, tasks), at most `threads` at a time, and returns when all are
// done. Which thread runs which task is not fixed, so a result must depend on i alone. The first
// exception of a task is rethrown here.
void parallel_for(int tasks, int threads, const std::function<void(int)>& body);

// "openmp" or "threads": which pool the next parallel_for uses.
const char* parallel_backend();

}  // namespace sk
