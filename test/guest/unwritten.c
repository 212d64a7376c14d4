/* SPDX-License-Identifier: MIT */
/*
 * Maps pages for a device that reads them, and writes them only then, as a driver
 * does that maps a buffer once: the device has to read what was written. Nobody has
 * touched the pages before, or they have been read and no more. Prints
 *
 *	guest: unwritten WHERE wrong=N
 *
 * for the end of low RAM, and of high RAM if there is any.
 */
#include "edu.h"

#define PAGES	4u
#define WORDS	4u

static u32 back[PVDMA_PAGE_BYTES / sizeof(u32)] __attribute__((aligned(PVDMA_PAGE_BYTES)));
static struct pvdma_counters counters;
static struct pvdma_host host;
static struct pvdma_assignment edu;
static u64 registers;

static u64 map(u64 gpa, u32 flags)
{
	u64 iova;

	if (!pvdma_map(&host, &counters, edu.handle, gpa, PVDMA_PAGE_BYTES, EDU_IOVA_MAX, flags,
		       &iova))
		return iova;
	print("guest: cannot map %lx\n", (unsigned long)gpa);
	power_off();
}

/* Words that the device did not read as they had been written. */
static u32 wrong_words(u64 gpa, u64 back_iova, bool read_before)
{
	volatile u32 *page = (volatile u32 *)gpa;
	u32 i, wrong = 0;
	u64 iova;

	if (read_before)
		wrong += page[0] != 0;
	iova = map(gpa, PVDMA_MAP_READ);
	for (i = 0; i < WORDS; i++) {
		page[i] = (u32)gpa + i + 1;
		back[i] = 0;
	}
	edu_fetch(registers, iova, WORDS * sizeof(u32));
	edu_wait(registers);
	edu_store(registers, back_iova, WORDS * sizeof(u32));
	edu_wait(registers);
	for (i = 0; i < WORDS; i++)
		wrong += ((volatile u32 *)back)[i] != (u32)gpa + i + 1;
	pvdma_unmap(&host, &counters, edu.handle, iova, PVDMA_PAGE_BYTES);
	return wrong;
}

/* Pages far enough from each other that none comes along with another that is touched. */
static void before(const char *where, u64 end, u64 back_iova)
{
	u32 i, wrong = 0;

	for (i = 0; i < PAGES; i++)
		wrong += wrong_words(end - PVDMA_PAGE_BYTES - (i << 22), back_iova, i % 2);
	print("guest: unwritten %s wrong=%u\n", where, wrong);
}

void guest_main(void)
{
	u64 back_iova;

	if (pvdma_discover(&host) == PVDMA_FOUND)
		registers = edu_open(&host, &counters, &edu);
	if (!registers) {
		print("guest: no edu\n");
		return;
	}
	back_iova = map((u64)back, PVDMA_MAP_READ | PVDMA_MAP_WRITE);
	before("low", guest_ram.low_end, back_iova);
	if (guest_ram.high_end)
		before("high", guest_ram.high_end, back_iova);
}
