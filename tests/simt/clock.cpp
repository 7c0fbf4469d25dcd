// Vector clocks: what happened before what.
#include <algorithm>

#include "executor.h"

namespace simt {

void SyncClock::own() {
  if (of == nullptr) of = std::make_shared<Clock>(current->base->size(), 0);
  else if (of.use_count() > 1) of = std::make_shared<Clock>(*of);
}
void SyncClock::join(const ClockRef& other) {
  if (other == joined) return;
  own();
  joined = other;
  uint32_t* mine = of->data();
  const uint32_t* theirs = other->data();
  for (size_t i = 0; i < of->size(); ++i) mine[i] = std::max(mine[i], theirs[i]);
}
void SyncClock::set(int id, uint32_t tick) {
  own();
  (*of)[id] = std::max((*of)[id], tick);
}
ClockRef SyncClock::take() {
  joined = nullptr;
  return std::move(of);
}

void publish(SyncClock& clock) {
  clock.join(current->base);
  clock.set(current->id, current->tick++);
}

void acquire(Thread& thread, const ClockRef& clock) {
  bool dominated = true;
  for (size_t i = 0; i < clock->size() && dominated; ++i) dominated = (*thread.base)[i] <= (*clock)[i];
  if (dominated) {
    thread.base = clock;
    return;
  }
  auto joined = std::make_shared<Clock>(*thread.base);
  for (size_t i = 0; i < joined->size(); ++i) (*joined)[i] = std::max((*joined)[i], (*clock)[i]);
  thread.base = joined;
}

}  // namespace simt
