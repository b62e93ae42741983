// Switching between stacks: what the threads of a kernel are made of.
#pragma once

// Saves the registers that a call preserves on the current stack, notes its top in *from, and
// goes on where `to` was saved.
extern "C" void metal_switch(void** from, void* to);

// Returns what metal_switch can go to: `start` on an empty stack that ends at `top`.
void* new_stack(char* top, void (*start)());
