/* SPDX-License-Identifier: MIT OR GPL-2.0 */
/*
 * The transport: how a frame reaches the host, and CPUID, with which it is found.
 * The only place with instructions of a machine in it. Another transport is
 * another header with these three functions; pvdma_core.c includes the one that
 * PVDMA_TRANSPORT names.
 */
#ifndef PVDMA_TRANSPORT_PIO_H
#define PVDMA_TRANSPORT_PIO_H

#ifndef __x86_64__
#error "pvdma: this transport is an x86-64 port write; this machine needs one of its own"
#endif

struct pvdma_cpuid {
	u32 eax;
	u32 ebx;
	u32 ecx;
	u32 edx;
};

static inline struct pvdma_cpuid pvdma_transport_cpuid(u32 leaf)
{
	struct pvdma_cpuid out;

	asm volatile("cpuid"
		     : "=a" (out.eax), "=b" (out.ebx), "=c" (out.ecx), "=d" (out.edx)
		     : "a" (leaf), "c" (0));
	return out;
}

/* One call. The memory clobber: the host reads the call page and may write it. */
static inline void pvdma_transport_call(const struct pvdma_host *host,
					struct pvdma_frame *frame)
{
	register u64 r8 asm("r8") = frame->r8;
	register u64 r9 asm("r9") = frame->r9;
	register u64 r10 asm("r10") = frame->r10;

	asm volatile("outl %%eax, %%dx"
		     : "+a" (frame->rax), "+D" (frame->rdi), "+S" (frame->rsi),
		       "+r" (r8), "+r" (r9), "+r" (r10)
		     : "d" (host->port)
		     : "memory");
	frame->r8 = r8;
	frame->r9 = r9;
	frame->r10 = r10;
}

/* Between two tries. */
static inline void pvdma_transport_relax(void)
{
	asm volatile("pause" : : : "memory");
}

#endif /* PVDMA_TRANSPORT_PIO_H */
