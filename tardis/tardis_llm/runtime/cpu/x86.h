// What files for the instruction sets of x86 share.
#pragma once
#include <immintrin.h>

#include "registers.h"
