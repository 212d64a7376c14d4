/* SPDX-License-Identifier: MIT */
/*
 * Drives QEMU's edu (a DMA engine) where nothing is mapped: before, between and
 * after transfers that are right, and into a page after it was unmapped. Waits
 * for a byte between the steps.
 */
#include "edu.h"

static u8 page[4096] __attribute__((aligned(4096)));
static struct pvdma_counters counters;
static struct pvdma_host host;
static struct pvdma_assignment edu;
static u64 registers;

/* 16 bytes from the bus address into the device. */
static void fetch(u64 iova)
{
	edu_fetch(registers, iova, 16);
	edu_wait(registers);
}

/* And the other way. */
static void store(u64 iova)
{
	edu_store(registers, iova, 16);
	edu_wait(registers);
}

/* Bytes to the device and back, elsewhere in the page. */
static void there_and_back(u64 iova)
{
	u32 i, wrong = 0;

	for (i = 0; i < 16; i++) {
		page[i]++;
		page[2048 + i] = 0;
	}
	fetch(iova);
	store(iova + 2048);
	for (i = 0; i < 16; i++)
		wrong += page[2048 + i] != page[i];
	print("guest: wrong %u\n", wrong);
}

void guest_main(void)
{
	u64 iova;
	u32 i;

	if (pvdma_discover(&host) == PVDMA_FOUND)
		registers = edu_open(&host, &counters, &edu);
	if (!registers ||
	    pvdma_map(&host, &counters, edu.handle, (u64)page, sizeof(page), EDU_IOVA_MAX,
		      PVDMA_MAP_READ | PVDMA_MAP_WRITE, &iova) != 0) {
		print("guest: no edu\n");
		return;
	}
	there_and_back(iova);
	fetch(0x2345000);
	print("guest: strayed\n");
	serial_read();
	for (i = 0; i < 5; i++)
		store(0x6789010);
	there_and_back(iova);
	serial_read();
	pvdma_unmap(&host, &counters, edu.handle, iova, sizeof(page));
	store(iova);
	print("guest: stale %lx\n", (unsigned long)iova);
	serial_read();
	print("guest: alive\n");
}
