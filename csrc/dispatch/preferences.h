// Kernels that were measured to be the fastest on this machine. select() looks here before it asks
// the cost model.
#pragma once
#include <vector>

#include "dispatch/registry.h"

namespace sk {

// The kernel for problems that differ from `problem` only in m, from m_from to m_to, in the share of
// W that is kept, and on a GPU in `threads`.
struct Preference {
  Problem problem;
  int64_t m_from, m_to;
  const Kernel* kernel;
};

// Null where there is none. Whether the kernel can run the problem is for the caller to ask.
const Kernel* preferred(const Problem& problem);

// Adds all of them at once: another thread sees every one or none. What a range covers is taken from
// older ranges.
void prefer(const std::vector<Preference>& preferences);
void clear_preferences();
// Ranges in the table.
int64_t preference_count();

}  // namespace sk
