/* SPDX-License-Identifier: MIT */
/*
 * QEMU's edu (docs/specs/edu) and ours: a device with a buffer of 4 KiB, to or
 * from which it copies by DMA, QEMU's 100 ms after it was told to. A range beyond
 * the buffer ends QEMU, so nothing here takes one. Bus addresses have 28 bits.
 */
#ifndef GUEST_EDU_H
#define GUEST_EDU_H

#include "lib.h"

#define EDU_ID		0x11e81234	/* the first word of its configuration space */
#define EDU_IOVA_MAX	0xfffffffull
/* Most bytes of a copy; QEMU 7.2 takes all 4096 for one too many. */
#define EDU_BYTES_MAX	4095u

#define EDU_IDENTITY	0x00
#define EDU_LIVENESS	0x04
#define EDU_FACTORIAL	0x08
#define EDU_STATUS	0x20
#define EDU_COMPUTING	0x01
#define EDU_STATUS_IRQ	0x80
#define EDU_IRQ_STATUS	0x24
#define EDU_IRQ_RAISE	0x60
#define EDU_IRQ_ACK	0x64
#define EDU_SOURCE	0x80
#define EDU_TARGET	0x88
#define EDU_BYTES	0x90
#define EDU_COMMAND	0x98
#define EDU_RUN		1
#define EDU_TO_MEMORY	2
#define EDU_IRQ		4
#define EDU_BUFFER	0x40000

#define PCI_COMMAND	0x04
#define PCI_MEMORY	(1 << 1)
#define PCI_MASTER	(1 << 2)
#define PCI_BAR0	0x10

/** edu_enable() - lets the device in a slot do DMA; returns where its registers are */
static inline u64 edu_enable(u32 slot)
{
	pci_write(slot, 0, PCI_COMMAND, PCI_MEMORY | PCI_MASTER);
	return pci_read(slot, 0, PCI_BAR0) & ~0xfu;
}

/** edu_find() - the slot of the first edu, if it is assigned; 0 otherwise */
static inline u32 edu_find(const struct pvdma_host *host, struct pvdma_counters *counters,
			   struct pvdma_assignment *answer)
{
	u32 slot = 1;

	while (slot < 32 && pci_read(slot, 0, 0) != EDU_ID)
		slot++;
	if (slot == 32 || pvdma_is_assigned(host, counters, slot << 3, answer) || !answer->handle)
		return 0;
	return slot;
}

/** edu_open() - where the registers of the first edu are, if it is assigned; it may do DMA then. 0 otherwise */
static inline u64 edu_open(const struct pvdma_host *host, struct pvdma_counters *counters,
			   struct pvdma_assignment *answer)
{
	u32 slot = edu_find(host, counters, answer);

	return slot ? edu_enable(slot) : 0;
}

/** edu_busy() - is the last copy not done yet? */
static inline bool edu_busy(u64 edu)
{
	return read32(edu + EDU_COMMAND) & EDU_RUN;
}

/** edu_wait() - waits for the end of the last copy; memory read afterwards is what it left there */
static inline void edu_wait(u64 edu)
{
	while (edu_busy(edu))
		relax();
	barrier();
}

/* What was written to memory before is there when the device begins. */
static inline void edu_copy(u64 edu, u64 from, u64 to, u32 bytes, u32 command)
{
	barrier();
	write32(edu + EDU_SOURCE, (u32)from);
	write32(edu + EDU_TARGET, (u32)to);
	write32(edu + EDU_BYTES, bytes < EDU_BYTES_MAX ? bytes : EDU_BYTES_MAX);
	write32(edu + EDU_COMMAND, command | EDU_RUN);
}

/** edu_fetch() - starts a copy from memory to the front of the buffer */
static inline void edu_fetch(u64 edu, u64 iova, u32 bytes)
{
	edu_copy(edu, iova, EDU_BUFFER, bytes, 0);
}

/** edu_store() - starts a copy from the front of the buffer to memory */
static inline void edu_store(u64 edu, u64 iova, u32 bytes)
{
	edu_copy(edu, EDU_BUFFER, iova, bytes, EDU_TO_MEMORY);
}

#endif /* GUEST_EDU_H */
