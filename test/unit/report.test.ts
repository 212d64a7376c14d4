import { suite } from "uvu";
import * as assert from "uvu/assert";
import { ratio, type Section, sectionSvg, sectionText, timesBestPeer } from "../bench/report.js";

const test = suite("report");

const section = (better: "more" | "less"): Section => ({
  id: "pair",
  title: "A pair",
  about: "",
  unit: "µs",
  better,
  reference: "pinned",
  peers: { best: "the best vIOMMU", contenders: ["lazy & co", "strict"] },
  rows: [
    {
      name: "one page",
      bars: [
        { contender: "pinned", values: [1, 2, 9] },
        { contender: "cached", values: [4] },
        { contender: "lazy & co", values: [400] },
        { contender: "strict", values: [100, 800, 900] },
      ],
    },
  ],
});

test("a figure is the median of its rounds, against the reference and the best peer, whatever is better", () => {
  for (const [better, expected] of [
    ["less", 100],
    ["more", 4 / 800],
  ] as const) {
    const it = section(better);
    const row = it.rows[0]!;
    assert.equal(ratio(it, row, row.bars[1]!), 2);
    assert.equal(timesBestPeer(it, row, row.bars[1]!), expected);
    assert.equal(timesBestPeer(it, row, row.bars[2]!), undefined);
  }
});

test("text and drawing say the same, and nothing in a name is markup", () => {
  const it = section("less");
  const line = sectionText(it)
    .split("\n")
    .find((words) => words.includes("cached"))!;
  assert.match(line, /4\.00 .* 2\.00 × pinned, 100 × as fast as the best vIOMMU$/);
  const svg = sectionSvg(it);
  assert.ok(svg.includes("4.00 (2.00 × pinned, 100 × as fast as the best vIOMMU)"));
  assert.ok(svg.includes("lazy &amp; co") && !svg.includes("lazy & co"));
});

test.run();
