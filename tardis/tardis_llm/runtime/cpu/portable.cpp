// The kernels for any processor.
#include "activations.h"
#include "kernels.h"

#include "generic.inc"

const tardis::Table* tardis::portable_table() { return &kTable; }
