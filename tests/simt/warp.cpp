// Operations of a warp: the last lane to come computes for all.
#include <algorithm>

#include "executor.h"

namespace simt {

void warp_collective(uint32_t mask, const char* name, void* mine, void (*compute)(uint32_t, void**), const void* at) {
  Thread& self = *current;
  const uint32_t bit = 1u << self.lane;
  if (!(mask & bit))
    fail(std::string(name) + ": the calling lane " + std::to_string(self.lane) + " is not in the mask", at);
  auto& active = run_state->collectives[self.warp];
  Collective* mine_of = nullptr;
  for (Collective* other : active) {
    if (other->mask == mask && !(other->arrived & bit)) mine_of = other;
    else if (other->mask & mask & other->arrived & ~bit && other->mask != mask && other->mask & bit &&
             std::strcmp(name, "__syncwarp") != 0)
      fail(std::string(name) + ": other lanes of its mask wait at a " + other->name + " with another mask", at);
  }
  if (mine_of != nullptr && std::strcmp(mine_of->name, name) != 0)
    fail(std::string(name) + ": other lanes of the warp came to " + mine_of->name, at);
  if (mine_of == nullptr) {
    mine_of = new Collective;
    mine_of->mask = mask;
    mine_of->name = name;
    active.push_back(mine_of);
  }
  mine_of->arrived |= bit;
  mine_of->lanes[self.lane] = mine;
  // Threads beyond the block's end in its last warp do not exist.
  const int warps = (self.block->threads + 31) / 32;
  const int lanes = std::min(32, self.block->threads - self.warp % warps * 32);
  const uint32_t all = lanes == 32 ? mask : mask & ((1u << lanes) - 1);
  if ((mine_of->arrived & all) != all) {
    wait_here(name, at);
    return;
  }
  active.erase(std::find(active.begin(), active.end(), mine_of));
  compute(all, mine_of->lanes);
  Thread* first = &self - self.lane;
  for (int i = 0; i < 32; ++i)
    if (all >> i & 1 && i != self.lane) wake(first + i);
  delete mine_of;
}

void sync_warp(uint32_t mask) {
  warp_collective(
      mask, "__syncwarp", current,
      [](uint32_t lanes, void** threads) {
        SyncClock clock;
        Thread* const self = current;
        for (int i = 0; i < 32; ++i)
          if (lanes >> i & 1) {
            current = static_cast<Thread*>(threads[i]);
            publish(clock);
          }
        current = self;
        const ClockRef joined = clock.take();
        for (int i = 0; i < 32; ++i)
          if (lanes >> i & 1) acquire(*static_cast<Thread*>(threads[i]), joined);
      },
      SIMT_CALLER);
}

uint64_t shuffle(uint32_t mask, uint64_t value, Shuffle kind, int operand, int width) {
  struct Lane {
    uint64_t value;
    int source;
    uint64_t result;
    const void* at;
  };
  const int lane = current->lane, begin = lane / width * width;
  int source = lane;
  switch (kind) {
    case Shuffle::kIndex: source = begin + (operand & (width - 1)); break;
    case Shuffle::kUp: source = lane - operand < begin ? lane : lane - operand; break;
    case Shuffle::kDown: source = lane + operand >= begin + width ? lane : lane + operand; break;
    case Shuffle::kXor: source = (lane ^ operand) >= begin + width ? lane : lane ^ operand; break;
  }
  static const char* const kNames[] = {"__shfl_sync", "__shfl_up_sync", "__shfl_down_sync", "__shfl_xor_sync"};
  const char* name = kNames[static_cast<int>(kind)];
  if (!(mask >> source & 1))
    fail(std::string(name) + ": reads lane " + std::to_string(source) + ", which is not in the mask", SIMT_CALLER);
  Lane mine{value, source, 0, SIMT_CALLER};
  warp_collective(
      mask, name, &mine,
      [](uint32_t lanes, void** all) {
        for (int i = 0; i < 32; ++i)
          if (lanes >> i & 1) {
            Lane& to = *static_cast<Lane*>(all[i]);
            if (!(lanes >> to.source & 1))
              fail("a shuffle reads lane " + std::to_string(to.source) + ", which the block does not have", to.at);
            to.result = static_cast<Lane*>(all[to.source])->value;
          }
      },
      SIMT_CALLER);
  return mine.result;
}

uint32_t vote(uint32_t mask, uint64_t value, Vote kind) {
  struct Lane {
    uint64_t value;
    Vote kind;
    uint32_t result;
  };
  static const char* const kNames[] = {"__ballot_sync",     "__match_any_sync",  "__match_all_sync",
                                       "__reduce_add_sync", "__reduce_add_sync", "__reduce_min_sync",
                                       "__reduce_min_sync", "__reduce_max_sync", "__reduce_max_sync",
                                       "__reduce_and_sync", "__reduce_or_sync",  "__reduce_xor_sync"};
  Lane mine{value, kind, 0};
  warp_collective(
      mask, kNames[static_cast<int>(kind)], &mine,
      [](uint32_t lanes, void** all) {
        auto lane = [&](int i) -> Lane& { return *static_cast<Lane*>(all[i]); };
        const int first = __builtin_ctz(lanes);
        uint32_t ballot = 0, sum = static_cast<uint32_t>(lane(first).value);
        bool same = true;
        for (int i = 0; i < 32; ++i) {
          if (!(lanes >> i & 1)) continue;
          const uint32_t v = static_cast<uint32_t>(lane(i).value);
          const int32_t s = static_cast<int32_t>(v), t = static_cast<int32_t>(sum);
          if (v) ballot |= 1u << i;
          same = same && lane(i).value == lane(first).value;
          if (i == first) continue;
          switch (lane(i).kind) {
            case Vote::kAdd:
            case Vote::kAddUnsigned: sum += v; break;
            case Vote::kMin: sum = s < t ? v : sum; break;
            case Vote::kMinUnsigned: sum = v < sum ? v : sum; break;
            case Vote::kMax: sum = s > t ? v : sum; break;
            case Vote::kMaxUnsigned: sum = v > sum ? v : sum; break;
            case Vote::kAnd: sum &= v; break;
            case Vote::kOr: sum |= v; break;
            case Vote::kXor: sum ^= v; break;
            default: break;
          }
        }
        for (int i = 0; i < 32; ++i) {
          if (!(lanes >> i & 1)) continue;
          Lane& to = lane(i);
          if (to.kind == Vote::kBallot) to.result = ballot;
          else if (to.kind == Vote::kMatchAll) to.result = same ? lanes : 0;
          else if (to.kind == Vote::kMatchAny) {
            for (int j = 0; j < 32; ++j)
              if (lanes >> j & 1 && lane(j).value == to.value) to.result |= 1u << j;
          } else to.result = sum;
        }
      },
      SIMT_CALLER);
  return mine.result;
}

}  // namespace simt
