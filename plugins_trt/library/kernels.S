// The compiled kernels, as one array.
    .section .rodata
    .balign 64
    .globl lvlm_kernels
    .hidden lvlm_kernels
lvlm_kernels:
    .incbin LVLM_KERNELS
    .section .note.GNU-stack, "", %progbits
