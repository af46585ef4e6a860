// How many threads the pool has (pool.cpp); kernels.h has what the ops themselves need of it.
#pragma once

// The number asked for, else what the machine, the affinity mask and the control group allow.
int puna_wanted_threads();

// Replaces the pool; regions under way finish. threads >= 1.
void puna_set_threads(int threads);
