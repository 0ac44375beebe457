// Matrix products on Hopper's tensor cores, as PTX has them (sm_90a): tiles that the copy engine lays out in shared
// memory, and warpgroups that multiply them.

#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "async.cuh"

namespace grpo_fast {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A matrix in shared memory as the tensor cores read it: rows of 128 bytes, swizzled in groups of eight.
__device__ inline uint64_t descriptor(const void* p) {
  return uint64_t(shared_address(p) >> 4 & 0x3fff) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

__device__ inline void mma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void mma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ inline void mma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

#define GRPO_FAST_F8(i)                                                                                       \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define GRPO_FAST_MMA(type)                                                                                         \
  asm volatile(                                                                                                     \
      "{\n"                                                                                                         \
      ".reg .pred add;\n"                                                                                           \
      "setp.ne.b32 add, %130, 0;\n"                                                                                 \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type                                                  \
      " "                                                                                                           \
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "                 \
      "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, "                  \
      "%38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, "                  \
      "%56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, "                  \
      "%74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, "                  \
      "%92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, "                    \
      "%108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, "                  \
      "%123, %124, %125, %126, %127}, "                                                                             \
      "%128, %129, add, 1, 1, 0, 0;\n"                                                                              \
      "}"                                                                                                           \
      : GRPO_FAST_F8(0), GRPO_FAST_F8(8), GRPO_FAST_F8(16), GRPO_FAST_F8(24), GRPO_FAST_F8(32), GRPO_FAST_F8(40),   \
        GRPO_FAST_F8(48), GRPO_FAST_F8(56), GRPO_FAST_F8(64), GRPO_FAST_F8(72), GRPO_FAST_F8(80), GRPO_FAST_F8(88), \
        GRPO_FAST_F8(96), GRPO_FAST_F8(104), GRPO_FAST_F8(112), GRPO_FAST_F8(120)                                   \
      : "l"(a), "l"(b), "r"(add))

// d (64 x 256) = a b, or += if `add`.
__device__ inline void mma(float (&d)[128], uint64_t a, uint64_t b, int add, __nv_bfloat16) { GRPO_FAST_MMA("bf16"); }
__device__ inline void mma(float (&d)[128], uint64_t a, uint64_t b, int add, __half) { GRPO_FAST_MMA("f16"); }

#undef GRPO_FAST_MMA
#undef GRPO_FAST_F8

// Start copying a tile at (depth, row) of a matrix; `blocks` is the set of the cluster's that get it, at the same
// place.
__device__ inline void copy_tile(void* to, const CUtensorMap* map, int depth, int row, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          shared_address(to)),
      "l"(map), "r"(depth), "r"(row), "r"(shared_address(barrier))
      : "memory");
}

__device__ inline void copy_tile_to_blocks(void* to, const CUtensorMap* map, int depth, int row, uint64_t* barrier,
                                           uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, "
      "%3}], [%4], %5;" ::"r"(shared_address(to)),
      "l"(map), "r"(depth), "r"(row), "r"(shared_address(barrier)), "h"(blocks)
      : "memory");
}

// Arrive at the barrier in the same place of another block's shared memory.
__device__ inline void barrier_arrive_at(uint64_t* barrier, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

#endif

}  // namespace grpo_fast
