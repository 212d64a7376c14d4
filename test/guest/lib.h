/* SPDX-License-Identifier: MIT */
/*
 * What a freestanding guest needs: printing on COM1, ports, PCI configuration,
 * the zero page, CPL 3, several CPUs, the end. A guest is one C file with
 * guest_main() in it, which runs on CPU 0. Memory is mapped one to one up to
 * 5 GiB, for CPL 3 as well, so a pointer is a gpa. Interrupts are off.
 */
#ifndef GUEST_LIB_H
#define GUEST_LIB_H

#include "pvdma_core.h"
#include "selectors.h"

#include <stddef.h>

/** guest_main() - the guest; the machine is powered off when it returns */
void guest_main(void);

/**
 * print() - formats to COM1
 *
 * %s, %u and %x (unsigned int), %lu and %lx (64 bits); nothing else. The output
 * of one call stays together, whatever other CPUs print.
 */
void print(const char *format, ...) __attribute__((format(printf, 1, 2)));

/** serial_read() - waits for a byte on COM1 */
u8 serial_read(void);

/** power_off() - by ACPI: S5 into the PM1 control register */
void power_off(void) __attribute__((noreturn));

/** reset() - by the reset port */
void reset(void) __attribute__((noreturn));

/** has_option() - is the word on the command line, alone or with a value? */
bool has_option(const char *word);

/** option_number() - the decimal N of WORD=N on the command line, or @otherwise */
u64 option_number(const char *word, u64 otherwise);

bool same_text(const char *a, const char *b);

/* Where RAM ends, from the memory map of the zero page; ends are exclusive. */
struct guest_ram {
	u64 low_end;		/* of what begins at 0 */
	u64 high_end;		/* of what begins at 4 GiB; 0: there is none */
};

extern struct guest_ram guest_ram;

/** pci_read() - 32 bits of configuration space on bus 0, by CF8 and CFC */
u32 pci_read(u32 device, u32 function, u32 offset);
void pci_write(u32 device, u32 function, u32 offset, u32 value);

/** cpu_count() - CPUs of the machine, 1 to CPUS_MAX; they are numbered from 0 */
u32 cpu_count(void);

/**
 * run_on_cpus() - calls a function on every CPU at once
 *
 * Only from CPU 0, where @function runs as well; returns when it has returned on
 * all of them. Each CPU has a stack of CPU_STACK_BYTES.
 */
void run_on_cpus(void (*function)(u32 cpu));

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

/** user_run() - calls a function at CPL 3, where all ports are open to it; CPU 0 only */
void user_run(void (*function)(void *argument), void *argument);

/* Keeps the compiler from moving accesses of memory over it, and from leaving them out. */
static inline void barrier(void)
{
	asm volatile("" : : : "memory");
}

/* Between two looks at what another CPU will change. */
static inline void relax(void)
{
	asm volatile("pause" : : : "memory");
}

/* A lock is a word that is 0 while nobody holds it. */
static inline void lock(u32 *word)
{
	while (__atomic_exchange_n(word, 1, __ATOMIC_ACQUIRE))
		relax();
}

static inline void unlock(u32 *word)
{
	__atomic_store_n(word, 0, __ATOMIC_RELEASE);
}

/* Device registers in memory. */
static inline u32 read32(u64 gpa)
{
	return *(volatile u32 *)gpa;
}

static inline void write32(u64 gpa, u32 value)
{
	*(volatile u32 *)gpa = value;
}

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
