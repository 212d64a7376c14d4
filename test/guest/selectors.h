/* SPDX-License-Identifier: MIT */
/* Numbers that start.S and lib.c share. No C in here. */
#ifndef GUEST_SELECTORS_H
#define GUEST_SELECTORS_H

/* As the boot protocol has them; the rest is ours. */
#define KERNEL_CODE	0x10
#define KERNEL_DATA	0x18
#define USER_DATA	0x23
#define USER_CODE	0x2b
#define TASK_STATE	0x30
#define GDT_ENTRIES	8

#define EXCEPTIONS	32

/* RFLAGS at CPL 3: bit 1 is always set; IOPL 0, the task state opens the ports. */
#define USER_FLAGS	0x2

/* CPUs have a stack each; all but the first begin in real mode, in this page. */
#define CPUS_MAX	16
#define CPU_STACK_BYTES	16384
#define TRAMPOLINE	0x10000

#define LAPIC		0xfee00000

#endif /* GUEST_SELECTORS_H */
