/* SPDX-License-Identifier: MIT */
/*
 * What a freestanding guest needs: printing on COM1, ports, PCI configuration,
 * the zero page, CPL 3, the end. A guest is one C file with guest_main() in it.
 * Memory is mapped one to one up to 4 GiB, for CPL 3 as well, so a pointer is a
 * gpa. One CPU, interrupts off.
 */
#ifndef GUEST_LIB_H
#define GUEST_LIB_H

#include "pvdma_core.h"

/** guest_main() - the guest; the machine is powered off when it returns */
void guest_main(void);

/**
 * print() - formats to COM1
 *
 * %s, %u and %x (unsigned int), %lu and %lx (64 bits); nothing else.
 */
void print(const char *format, ...) __attribute__((format(printf, 1, 2)));

/** serial_read() - waits for a byte on COM1 */
u8 serial_read(void);

/** power_off() - by ACPI: S5 into the PM1 control register */
void power_off(void) __attribute__((noreturn));

/** reset() - by the reset port */
void reset(void) __attribute__((noreturn));

/** has_option() - is the word on the command line? */
bool has_option(const char *word);

bool same_text(const char *a, const char *b);

/* Where RAM ends, from the memory map of the zero page; ends are exclusive. */
struct guest_ram {
	u64 low_end;		/* of what begins at 0 */
	u64 high_end;		/* of what begins at 4 GiB; 0: there is none */
};

extern struct guest_ram guest_ram;

/** pci_read() - 32 bits of configuration space on bus 0, by CF8 and CFC */
u32 pci_read(u32 device, u32 function, u32 offset);

/* All general registers but the stack pointer; start.S knows the order. */
struct registers {
	u64 rax, rbx, rcx, rdx, rsi, rdi, rbp;
	u64 r8, r9, r10, r11, r12, r13, r14, r15;
};

#define REGISTERS	(sizeof(struct registers) / sizeof(u64))

/* One instruction each, with all registers loaded before and stored after it. */
void registers_out32(struct registers *registers);
void registers_out16(struct registers *registers);
void registers_out8(struct registers *registers);
void registers_in32(struct registers *registers);
void registers_outs32(struct registers *registers);
void registers_rep_outs32(struct registers *registers);

/** user_run() - calls a function at CPL 3, where all ports are open to it */
void user_run(void (*function)(void *argument), void *argument);

static inline void out8(u16 port, u8 value)
{
	asm volatile("outb %0, %1" : : "a" (value), "Nd" (port) : "memory");
}

static inline void out16(u16 port, u16 value)
{
	asm volatile("outw %0, %1" : : "a" (value), "Nd" (port) : "memory");
}

static inline void out32(u16 port, u32 value)
{
	asm volatile("outl %0, %1" : : "a" (value), "Nd" (port) : "memory");
}

static inline u8 in8(u16 port)
{
	u8 value;

	asm volatile("inb %1, %0" : "=a" (value) : "Nd" (port) : "memory");
	return value;
}

static inline u32 in32(u16 port)
{
	u32 value;

	asm volatile("inl %1, %0" : "=a" (value) : "Nd" (port) : "memory");
	return value;
}

#endif /* GUEST_LIB_H */
