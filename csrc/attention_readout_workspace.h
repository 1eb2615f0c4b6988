// Where the buffers of attention_readout lie. Used by attention_readout.cpp and by every instruction-set level.
#pragma once

#include "attention_readout.h"

namespace {

constexpr int64_t kLargestWidth = 16;  // floats of the widest vector
constexpr int64_t kLargestPanel = 64;  // channels of a panel at the level with the widest
constexpr int64_t kKeysAhead = 16;     // values of keys that are asked for before their turn

constexpr int64_t rounded_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

// Cuts pieces, each aligned like the whole for any of their types, out of memory; with null it only adds up.
class Carver {
 public:
  explicit Carver(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <typename T>
  T* take(int64_t count) {
    T* piece = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + bytes_);
    bytes_ += rounded_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return piece;
  }

  int64_t bytes() const { return bytes_; }

 private:
  char* memory_;
  int64_t bytes_ = 0;
};

// Of one thread. Keys are arranged by group and, within it, by column; those of one column and group are a segment.
struct ReadoutWorkspace {
  int32_t* order;          // [length + kKeysAhead], keys as arranged; the last one is repeated
  int32_t* other;          // [length]
  int32_t* counts;         // [length or n_groups + 1]
  int32_t* group_begin;    // [n_groups + 1], places in `order`
  int32_t* group_segment;  // [n_groups + 1], segments of each group
  int32_t* segment_begin;  // [length + 1], places in `order`
  float* factors;          // [segments, pitch]
  float* query;            // [dim]
  float* scores;           // [length], by key
  float* arranged;         // [length], scores as arranged
  float* weights;          // [length], as arranged
  float* masses;           // [segments]
  float* sums;             // [panels, segments of a group, channels of a panel]
  float* variant_mass;     // [pitch]
  float* inverse;          // [pitch]
  int64_t bytes;

  ReadoutWorkspace(const CaptAttentionReadout& args, void* memory) {
    const int64_t length = args.length, padded = rounded_up(length, kLargestWidth);
    const int64_t channels = rounded_up(args.dim, kLargestPanel), pitch = rounded_up(args.variants, kLargestWidth);
    const bool several = args.variants > 1;
    Carver carver(memory);
    order = carver.take<int32_t>(length + kKeysAhead);
    other = carver.take<int32_t>(length);
    counts = carver.take<int32_t>((length > args.n_groups ? length : args.n_groups) + 1);
    group_begin = carver.take<int32_t>(args.n_groups + 1);
    group_segment = carver.take<int32_t>(args.n_groups + 1);
    segment_begin = carver.take<int32_t>(length + 1);
    factors = carver.take<float>(several ? length * pitch : 0);
    query = carver.take<float>(channels);
    scores = carver.take<float>(padded);
    arranged = carver.take<float>(padded);
    weights = carver.take<float>(padded);
    masses = carver.take<float>(padded);
    sums = carver.take<float>(several && length > 1 ? length * channels : channels);
    variant_mass = carver.take<float>(pitch);
    inverse = carver.take<float>(pitch);
    bytes = carver.bytes();
  }
};

}  // namespace
