// What a benchmark measured, as data, and the three forms it is shown in: text, a chart (SVG), a page (HTML). A figure
// is never shown without its spread, and a ratio only between figures of one run.

import { median } from "../median.js";

/** Figures that belong in one chart. */
export interface Section {
  /** Names its files: letters, digits, hyphens. */
  readonly id: string;
  readonly title: string;
  /** What was done and how, in a sentence or two. */
  readonly about: string;
  /** Of every value, such as "MiB/s". */
  readonly unit: string;
  readonly better: "more" | "less";
  /** The contender that ratios are to. Absent: none are shown. */
  readonly reference?: string;
  /** Contenders to beat, under a name for the best of them: the others are compared with that one too. */
  readonly peers?: { readonly best: string; readonly contenders: readonly string[] };
  readonly rows: readonly Row[];
  /** When it was measured and on what, such as Date: "2026-11-29": a report may have sections of several runs. */
  readonly measured?: Readonly<Record<string, string>>;
}

/** One thing that was measured, of each contender. */
export interface Row {
  readonly name: string;
  readonly bars: readonly Bar[];
}

export interface Bar {
  readonly contender: string;
  /** One per round, turn or start, in their order; at least one. */
  readonly values: readonly number[];
}

export interface Report {
  readonly sections: readonly Section[];
}

/** A bar's median over that of the section's reference in the same row; undefined where there is none to compare with. */
export function ratio(section: Section, row: Row, bar: Bar): number | undefined {
  const reference = row.bars.find(({ contender }) => contender === section.reference);
  return reference === undefined ? undefined : median(bar.values) / median(reference.values);
}

/** Three significant digits, without an exponent. */
export function figure(value: number): string {
  if (value === 0) return "0";
  const digits = Math.max(0, 2 - Math.floor(Math.log10(Math.abs(value))));
  return value.toFixed(Math.min(digits, 6));
}

const spreadOf = ({ values }: Bar): string =>
  values.length === 1 ? "" : `${figure(Math.min(...values))} to ${figure(Math.max(...values))}`;

/** How many times as fast a bar is as the best peer of its row; undefined for peers, and without any. */
export function timesBestPeer({ peers, better }: Section, row: Row, bar: Bar): number | undefined {
  if (peers === undefined || peers.contenders.includes(bar.contender)) return undefined;
  const theirs = row.bars.filter(({ contender }) => peers.contenders.includes(contender));
  if (theirs.length === 0) return undefined;
  const medians = theirs.map(({ values }) => median(values));
  return better === "more"
    ? median(bar.values) / Math.max(...medians)
    : Math.min(...medians) / median(bar.values);
}

function ratioOf(section: Section, row: Row, bar: Bar): string {
  const times = bar.contender === section.reference ? undefined : ratio(section, row, bar);
  const peer = timesBestPeer(section, row, bar);
  return [
    ...(times === undefined ? [] : [`${figure(times)} × ${section.reference}`]),
    ...(peer === undefined ? [] : [`${figure(peer)} × as fast as ${section.peers!.best}`]),
  ].join(", ");
}

/** A section as lines for a terminal. */
export function sectionText(section: Section): string {
  const width = Math.max(
    ...section.rows.flatMap(({ bars }) => bars.map(({ contender }) => contender.length)),
  );
  const lines = [`${section.title} (${section.unit}, ${section.better} is better)`];
  for (const row of section.rows) {
    lines.push(`  ${row.name}`);
    for (const bar of row.bars) {
      const spread = spreadOf(bar) === "" ? "" : `(${spreadOf(bar)})`;
      const value = figure(median(bar.values)).padStart(9);
      lines.push(
        `    ${bar.contender.padEnd(width)} ${value}  ${spread.padEnd(18)} ${ratioOf(section, row, bar)}`.trimEnd(),
      );
    }
  }
  return `${lines.join("\n")}\n`;
}

const escaped = (text: string): string =>
  text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;").replaceAll('"', "&quot;");

// The chart, in units of the SVG.
const WIDTH = 760;
/** Where bars have a second ratio beside them. */
const WIDE = 1000;
const LABELS = 190;
const BARS = 330;
const BAR_HEIGHT = 18;
const BAR_STEP = 24;
const ROW_HEAD = 26;
const TOP = 58;
/** By contender; told apart in grey as well, and by people who do not see red. */
const COLOURS = ["#9aa4ae", "#0b6e99", "#e69f00", "#56b4e9", "#7a5195", "#009e73", "#5c6770", "#cc79a7"];

/**
 * A section as a drawing that stands alone: a group of bars per row, each as long as its median is against the largest of
 * its row, with a line from the least to the largest value of its rounds.
 */
export function sectionSvg(section: Section): string {
  const width = section.peers === undefined ? WIDTH : WIDE;
  const contenders = [...new Set(section.rows.flatMap(({ bars }) => bars.map(({ contender }) => contender)))];
  const parts: string[] = [];
  const text = (x: number, y: number, words: string, more = "") =>
    parts.push(`<text x="${x}" y="${y}" ${more}>${escaped(words)}</text>`);
  text(12, 24, section.title, 'font-size="16" font-weight="600"');
  text(12, 43, `${section.unit}, ${section.better} is better`, 'fill="#5c6770"');
  let y = TOP;
  for (const row of section.rows) {
    text(12, y + 17, row.name, 'font-weight="600"');
    y += ROW_HEAD;
    const most = Math.max(...row.bars.flatMap(({ values }) => values));
    const at = (value: number): number => LABELS + (most === 0 ? 0 : (value / most) * BARS);
    const fixed = (value: number): string => value.toFixed(1);
    for (const bar of row.bars) {
      const colour = COLOURS[contenders.indexOf(bar.contender) % COLOURS.length]!;
      const middle = y + BAR_HEIGHT / 2;
      const end = at(median(bar.values));
      text(LABELS - 8, y + 13, bar.contender, 'text-anchor="end"');
      parts.push(
        `<rect x="${LABELS}" y="${y}" width="${fixed(Math.max(end - LABELS, 1))}" height="${BAR_HEIGHT}" rx="2" fill="${colour}"/>`,
        `<path d="M${fixed(at(Math.min(...bar.values)))} ${middle}H${fixed(at(Math.max(...bar.values)))}" stroke="#1b1f23" stroke-width="1.5"/>`,
      );
      const times = ratioOf(section, row, bar);
      const words = `${figure(median(bar.values))}${times === "" ? "" : ` (${times})`}`;
      text(Number(fixed(at(Math.max(...bar.values)))) + 8, y + 13, words);
      y += BAR_STEP;
    }
    y += 8;
  }
  return `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${y + 8}" viewBox="0 0 ${width} ${y + 8}" font-family="system-ui, sans-serif" font-size="13" fill="#1b1f23" role="img" aria-label="${escaped(section.title)}">
<rect width="100%" height="100%" fill="#ffffff"/>
${parts.join("\n")}
</svg>
`;
}

function sectionTable(section: Section): string {
  const rows = section.rows.flatMap((row) =>
    row.bars.map((bar) => {
      const cells = [
        row.name,
        bar.contender,
        figure(median(bar.values)),
        spreadOf(bar),
        ratioOf(section, row, bar),
      ];
      return `<tr>${cells.map((cell) => `<td>${escaped(cell)}</td>`).join("")}</tr>`;
    }),
  );
  return `<table><tr><th></th><th></th><th>median</th><th>least to most</th><th>ratio</th></tr>\n${rows.join("\n")}\n</table>`;
}

/** A report as one page without anything to load. */
export function reportHtml({ sections }: Report): string {
  const measured = (section: Section): string =>
    Object.entries(section.measured ?? {})
      .map(([what, words]) => escaped(`${what}: ${words}`))
      .join("; ");
  const body = sections.map(
    (section) =>
      `<h2 id="${section.id}">${escaped(section.title)}</h2>\n<p>${escaped(section.about)}</p>\n<p class="measured">${measured(section)}</p>\n${sectionSvg(section)}<details><summary>figures</summary>${sectionTable(section)}</details>`,
  );
  return `<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>pvdma: benchmarks</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em; color: #1b1f23; background: #fff }
table { border-collapse: collapse; margin: 1em 0 } td, th { text-align: left; padding: 2px 12px 2px 0; border-bottom: 1px solid #e1e4e8 }
svg { max-width: 100%; height: auto }
.measured { color: #57606a; font-size: 13px }
</style>
<h1>pvdma: benchmarks</h1>
<p>Contenders take turns, round by round, and a figure is the median of its rounds; the line in a bar goes from the least to
the most. In the lab all processors are software: its absolute figures say little, ratios within a chart are what counts.
Charts may be of different runs and machines: figures of two of them do not compare.</p>
${body.join("\n")}
</html>
`;
}
