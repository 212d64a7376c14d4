/* SPDX-License-Identifier: MIT */
/*
 * What a freestanding guest cannot say in C: the setup header that makes it a
 * bzImage, the 64-bit entry, that of the other CPUs, exceptions, the way to CPL 3
 * and back, and port instructions between two looks at all registers.
 */
#include "selectors.h"

/*
 * The setup header (Documentation/arch/x86/boot.rst, "The Real-Mode Kernel
 * Header"): the fields a loader looks at, at their offsets in the file.
 */
	.section .setup, "a"
	.org	0x1f1
	.byte	1			/* setup_sects: one after the boot sector */
	.org	0x1f4
	.long	guest_payload_paragraphs /* syssize */
	.org	0x1fe
	.word	0xaa55			/* boot_flag */
	.byte	0xeb, header_end - . - 1 /* jump: where the header ends */
	.ascii	"HdrS"
	.word	0x020c			/* version */
	.org	0x211
	.byte	1			/* loadflags: LOADED_HIGH */
	.org	0x22c
	.long	0x7fffffff		/* initrd_addr_max */
	.long	0x1000			/* kernel_alignment */
	.byte	0			/* relocatable_kernel: it is not */
	.org	0x236
	.word	1			/* xloadflags: XLF_KERNEL_64 */
	.long	2047			/* cmdline_size */
	.org	0x258
	.quad	guest_load		/* pref_address */
	.long	guest_init_bytes	/* init_size */
	.long	0			/* handover_offset */
header_end:
	.org	0x400

/* 64-bit entry: long mode, memory one to one, RSI the zero page, no stack. */
	.section .entry, "ax"
	.org	0x200
	.globl	entry
entry:
	cld
	movl	$stacks + CPU_STACK_BYTES, %esp
	movl	$guest_payload_end, %edi
	movl	$guest_end, %ecx
	subl	%edi, %ecx
	shrl	$3, %ecx
	xorl	%eax, %eax
	rep stosq
	movq	%rsi, %rdi
	call	guest_start
1:	hlt
	jmp	1b

	.text

/*
 * Where the other CPUs begin. run_on_cpus() copies it to TRAMPOLINE, so inside
 * only distances are known; what is outside has its own address. From real mode
 * straight into long mode, with CPU 0's tables.
 */
#define CR0_LONG	0x80000031	/* PG, NE, ET, PE */
#define CR4_PAE		0x20
#define EFER		0xc0000080
#define EFER_LME	0x100
#define LAPIC_ID	(LAPIC + 0x20)

	.globl	trampoline, trampoline_end
	.code16
trampoline:
	cli
	movw	%cs, %ax
	movw	%ax, %ds
	lgdtl	trampoline_gdt - trampoline
	movl	$CR4_PAE, %eax
	movl	%eax, %cr4
	movl	$page_tables, %eax
	movl	%eax, %cr3
	movl	$EFER, %ecx
	movl	$EFER_LME, %eax
	xorl	%edx, %edx
	wrmsr
	movl	$CR0_LONG, %eax
	movl	%eax, %cr0
	ljmpl	$KERNEL_CODE, $cpu_entry
trampoline_gdt:
	.word	GDT_ENTRIES * 8 - 1
	.long	gdt
trampoline_end:

	.code64
cpu_entry:
	movl	$KERNEL_DATA, %eax
	movl	%eax, %ds
	movl	%eax, %es
	movl	%eax, %ss
	movl	$LAPIC_ID, %eax
	movl	(%rax), %edi
	shrl	$24, %edi
	imull	$CPU_STACK_BYTES, %edi, %esp
	addl	$stacks + CPU_STACK_BYTES, %esp
	call	cpu_start

/*
 * Exceptions: a stub per vector, 16 bytes apart, so that C finds them without a
 * table. All arrive at the same stack frame, with an error code (0 where the CPU
 * pushes none).
 */
	.balign	16
	.globl	exception_stubs
exception_stubs:
	vector = 0
	.rept	EXCEPTIONS
	.balign	16
	.if	!(vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21 || vector == 29 || vector == 30)
	pushq	$0
	.endif
	pushq	$vector
	jmp	exception_common
	vector = vector + 1
	.endr
exception_common:
	movq	%rsp, %rdi
	andq	$-16, %rsp
	call	exception_report	/* never returns here */

/*
 * void user_run(void (*function)(void *), void *argument): calls it at CPL 3
 * and returns when it does. The way back is the exception of an invalid opcode,
 * at which exception_report() calls user_return: KVM's instruction emulator knows
 * no int in long mode, but every exception.
 */
	.globl	user_run
user_run:
	pushq	%rbx
	pushq	%rbp
	pushq	%r12
	pushq	%r13
	pushq	%r14
	pushq	%r15
	movq	%rsp, user_return_rsp
	pushq	$USER_DATA
	pushq	$user_stack_end
	pushq	$USER_FLAGS
	pushq	$USER_CODE
	pushq	$user_entry
	iretq
user_entry:
	movq	%rdi, %rax
	movq	%rsi, %rdi
	call	*%rax
	.globl	user_end
user_end:
	ud2
	.globl	user_return
user_return:
	/* what the exception left on its stack is forgotten */
	movq	user_return_rsp, %rsp
	popq	%r15
	popq	%r14
	popq	%r13
	popq	%r12
	popq	%rbp
	popq	%rbx
	ret

/*
 * void NAME(struct registers *registers): loads all of them, executes one
 * instruction, stores all of them. The offsets are those of lib.h.
 */
	.macro	with_registers name, instruction:vararg
	.globl	\name
\name:
	pushq	%rbx
	pushq	%rbp
	pushq	%r12
	pushq	%r13
	pushq	%r14
	pushq	%r15
	pushq	%rdi
	movq	0(%rdi), %rax
	movq	8(%rdi), %rbx
	movq	16(%rdi), %rcx
	movq	24(%rdi), %rdx
	movq	32(%rdi), %rsi
	movq	48(%rdi), %rbp
	movq	56(%rdi), %r8
	movq	64(%rdi), %r9
	movq	72(%rdi), %r10
	movq	80(%rdi), %r11
	movq	88(%rdi), %r12
	movq	96(%rdi), %r13
	movq	104(%rdi), %r14
	movq	112(%rdi), %r15
	movq	40(%rdi), %rdi
	\instruction
	pushq	%rdi
	movq	8(%rsp), %rdi
	movq	%rax, 0(%rdi)
	movq	%rbx, 8(%rdi)
	movq	%rcx, 16(%rdi)
	movq	%rdx, 24(%rdi)
	movq	%rsi, 32(%rdi)
	popq	40(%rdi)
	movq	%rbp, 48(%rdi)
	movq	%r8, 56(%rdi)
	movq	%r9, 64(%rdi)
	movq	%r10, 72(%rdi)
	movq	%r11, 80(%rdi)
	movq	%r12, 88(%rdi)
	movq	%r13, 96(%rdi)
	movq	%r14, 104(%rdi)
	movq	%r15, 112(%rdi)
	popq	%rdi
	popq	%r15
	popq	%r14
	popq	%r13
	popq	%r12
	popq	%rbp
	popq	%rbx
	ret
	.endm

	with_registers registers_out32, outl %eax, %dx
	with_registers registers_out16, outw %ax, %dx
	with_registers registers_out8, outb %al, %dx
	with_registers registers_in32, inl %dx, %eax
	with_registers registers_outs32, outsl
	with_registers registers_rep_outs32, rep outsl

	.bss
	.balign	16
stacks:
	.skip	CPUS_MAX * CPU_STACK_BYTES
	.skip	4096
	.globl	interrupt_stack_end
interrupt_stack_end:
	.skip	4096
user_stack_end:
user_return_rsp:
	.skip	8

	.section .note.GNU-stack, "", @progbits
