// Fixed-width names without any system header: this file is compiled by hiprtc, NVRTC, clang and the host compiler.
#pragma once

typedef signed char i8;
typedef unsigned char u8;
typedef short i16;
typedef unsigned short u16;
typedef int i32;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;
typedef u16 f16_bits;   // IEEE 754 binary16, as stored
