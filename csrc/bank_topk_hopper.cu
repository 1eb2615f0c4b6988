#include "bank_topk.cuh"

namespace bank {

bool hopper_can(const CaptBankTopkCuda&) { return false; }

int launch_hopper(const Task&, int, void*) { return 1; }

}  // namespace bank
