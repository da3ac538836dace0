// Functions between BEGIN_TARGET and END_TARGET may use instructions that the build does not require of a processor.
//
// System headers and kernels.hpp belong before BEGIN_TARGET: an inline function of theirs, compiled for more than the
// baseline, could be the copy that the linker keeps for the whole program. GCC's setting lasts to the end of the file,
// so that templates that are instantiated there have it too.
#pragma once

#define EDGE_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define BEGIN_TARGET(set) EDGE_PRAGMA(clang attribute push(__attribute__((target(set))), apply_to = function))
#define END_TARGET EDGE_PRAGMA(clang attribute pop)
#define UNROLL EDGE_PRAGMA(clang loop unroll(full))
#define NEON_DOTPROD "dotprod"
#define NEON_I8MM "dotprod,i8mm"
#else
#define BEGIN_TARGET(set) EDGE_PRAGMA(GCC target(set))
#define END_TARGET
#define UNROLL EDGE_PRAGMA(GCC unroll 32)
#define NEON_DOTPROD "arch=armv8.2-a+dotprod"
#define NEON_I8MM "arch=armv8.2-a+dotprod+i8mm"
#endif
