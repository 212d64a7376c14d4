/* SPDX-License-Identifier: MIT */
/*
 * The life of a machine: maps a page for the first assigned device, leaves it
 * mapped, and ends as the command line asks for: `reset', `fault' (a triple
 * fault), `ask' (waits for a byte: r is reset, f is fault, anything else is
 * power-off), `flood' (prints for ever). With `busy', the other CPUs are at work
 * at the end: one in a loop, the others in map and unmap calls.
 */
#include "lib.h"

#define CALLS_BEFORE_THE_END	20

static u8 pages[CPUS_MAX][4096] __attribute__((aligned(4096)));
static struct pvdma_counters counters[CPUS_MAX];
static struct pvdma_assignment assignment;
static struct pvdma_host host;
static u32 calls;

static bool find_device(void)
{
	u32 slot;

	if (pvdma_discover(&host) != PVDMA_FOUND)
		return false;
	for (slot = 1; slot < 32; slot++) {
		if (pvdma_is_assigned(&host, counters, slot << 3, &assignment) == 0 &&
		    assignment.handle)
			return true;
	}
	return false;
}

static bool map_page(u32 cpu, u64 *iova)
{
	return pvdma_map(&host, &counters[cpu], assignment.handle, (u64)pages[cpu],
			 sizeof(pages[cpu]), ~0ull, PVDMA_MAP_READ, iova) == 0;
}

static void triple_fault(void)
{
	static const struct {
		u16 limit;
		u64 base;
	} __attribute__((packed)) none = { 0, 0 };

	/* No descriptor for the exception, nor for the double fault after it. */
	__asm__ volatile("lidt %0\n\tud2" : : "m"(none));
}

static void end(void)
{
	u8 asked = has_option("ask") ? serial_read() : 0;

	if (has_option("reset") || asked == 'r')
		reset();
	if (has_option("fault") || asked == 'f')
		triple_fault();
	while (has_option("flood"))
		print("guest: and so on and on and on and on and on and on and on\n");
	if (asked)
		print("guest: got %x\n", asked);
	power_off();
}

static void work(u32 cpu)
{
	u64 iova;

	if (cpu == 0) {
		while (__atomic_load_n(&calls, __ATOMIC_RELAXED) < CALLS_BEFORE_THE_END)
			relax();
		end();
	}
	while (cpu == 1)
		relax();
	for (;;) {
		if (map_page(cpu, &iova))
			pvdma_unmap(&host, &counters[cpu], assignment.handle, iova,
				    sizeof(pages[cpu]));
		__atomic_add_fetch(&calls, 1, __ATOMIC_RELAXED);
	}
}

void guest_main(void)
{
	u64 iova;

	if (find_device() && map_page(0, &iova))
		print("guest: mapped\n");
	print("guest: alive\n");
	if (has_option("busy"))
		run_on_cpus(work);
	end();
}
