/* SPDX-License-Identifier: MIT OR GPL-2.0 */
/*
 * The transport of core_test.c: a host in the same program. It stands where
 * pvdma_transport_pio.h stands in a guest.
 */
#ifndef PVDMA_TEST_SCRIPTED_H
#define PVDMA_TEST_SCRIPTED_H

struct pvdma_cpuid {
	u32 eax;
	u32 ebx;
	u32 ecx;
	u32 edx;
};

struct pvdma_cpuid pvdma_transport_cpuid(u32 leaf);
void pvdma_transport_call(const struct pvdma_host *host, struct pvdma_frame *frame);
void pvdma_transport_relax(void);

#endif /* PVDMA_TEST_SCRIPTED_H */
