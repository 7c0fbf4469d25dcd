// What each file of the bindings adds to the module.
#pragma once

#include <nanobind/nanobind.h>

namespace pycm::bind {

void bind_contrastive(nanobind::module_& module);
void bind_limits(nanobind::module_& module);
void bind_similarity(nanobind::module_& module);
void bind_topk(nanobind::module_& module);
void bind_rank(nanobind::module_& module);
void bind_join(nanobind::module_& module);
void bind_maxsim(nanobind::module_& module);
void bind_gallery(nanobind::module_& module);
void bind_xattn(nanobind::module_& module);
void bind_cuda(nanobind::module_& module);
void bind_cuda_sets(nanobind::module_& module);
void bind_cuda_temporal(nanobind::module_& module);
void bind_system(nanobind::module_& module);
void bind_pool_states(nanobind::module_& module);
void bind_temporal_pool(nanobind::module_& module);

}  // namespace pycm::bind
