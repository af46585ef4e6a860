/**
 * Pictures in knitting: the page's own way of drawing. A stitch is a V; a row of them is a meter, a field of them is the
 * engine's memory, a chart of letters is the plateau with its llamas.
 *
 * Surprising: one path a colour, however many stitches, so that a thousand of them cost a handful of elements; colours
 * are classes, since the page's security policy allows no styles in attributes.
 */

import type { VNode } from 'preact';

/** Width of a stitch, distance of two rows, and how far a V hangs down, in units of the drawing. */
const WIDE = 10;
const ROW = 8;
const DIP = 5;

function stitch(column: number, row: number): string {
  const x = column * WIDE;
  const y = row * ROW;
  const legs = ROW - 0.7;
  return (
    `M${x + 0.4} ${y}l4.4 ${DIP}v${legs}l-4.4 ${-DIP}z` + `M${x + WIDE - 0.4} ${y}l-4.4 ${DIP}v${legs}l4.4 ${-DIP}z`
  );
}

/** A field of stitches, read from charts of letters: a letter is a colour (class `wool-LETTER`), a dot is none. */
export function Chart({ rows, className, label }: { rows: readonly string[]; className?: string; label?: string }): VNode {
  const columns = Math.max(1, ...rows.map((row) => row.length));
  const paths = new Map<string, string>();
  rows.forEach((row, y) => {
    for (let x = 0; x < row.length; x++) {
      const wool = row[x] ?? '.';
      if (wool !== '.') paths.set(wool, (paths.get(wool) ?? '') + stitch(x, y));
    }
  });
  return (
    <svg
      class={'knit ' + (className ?? '')}
      viewBox={`0 0 ${columns * WIDE} ${rows.length * ROW + DIP}`}
      {...(label ? { role: 'img', 'aria-label': label } : { 'aria-hidden': 'true' as const })}
    >
      {[...paths].map(([wool, d]) => (
        <path key={wool} class={'wool-' + wool} d={d} />
      ))}
    </svg>
  );
}

/** How many of `cells` stitches each part gets: none that is there vanishes, and the sum is `cells`. */
export function shares(parts: readonly number[], cells: number): number[] {
  const total = parts.reduce((sum, part) => sum + part, 0);
  if (total <= 0) return parts.map(() => 0);
  const given = parts.map((part) => (part > 0 ? Math.max(1, Math.round((part / total) * cells)) : 0));
  let over = given.reduce((sum, part) => sum + part, 0) - cells;
  while (over !== 0) {
    const at = given.indexOf(Math.max(...given));
    const step = over > 0 ? -1 : 1;
    given[at] = (given[at] ?? 0) + step;
    over += step;
  }
  return given;
}

/** A row of stitches of which a share is knitted: a meter. */
export function Meter({ share, label, stitches = 24 }: { share: number; label: string; stitches?: number }): VNode {
  const full = Math.min(stitches, share > 0 ? Math.max(1, Math.round(share * stitches)) : 0);
  const wool = share > 0.9 ? 'r' : 'g';
  return <Chart rows={[wool.repeat(full) + '-'.repeat(stitches - full)]} className="meter" label={label} />;
}

/** A field of pages: used ones first, then those that hold what may be asked for again, then free ones. */
export function Pages({ used, cached, free, columns, label }: {
  used: number;
  cached: number;
  free: number;
  columns: number;
  label: string;
}): VNode {
  const total = used + cached + free;
  const cells = Math.min(total, columns * 12);
  const [u = 0, c = 0, f = 0] = shares([used, cached, free], cells);
  const all = 'r'.repeat(u) + 'g'.repeat(c) + '-'.repeat(f);
  const rows: string[] = [];
  for (let at = 0; at < all.length; at += columns) rows.push(all.slice(at, at + columns).padEnd(columns, '.'));
  return <Chart rows={rows} className="pages" label={label} />;
}

const BABY = [
  '......f.f.',
  '......fff.',
  '......ffff',
  '......ff..',
  'f.....ff..',
  'ffffffff..',
  'ffffffff..',
  '.ffffff...',
  '.ff..ff...',
  '.f....f...',
  '.f....f...',
];

const LLAMA = [
  '..........w.w..',
  '..........www..',
  '..........wwww.',
  '..........wwww.',
  '..........www..',
  '..........www..',
  'ww........www..',
  'wwwwwwwwwwwww..',
  '.wwrgrgrgwwww..',
  '.wwgrgrgrwwww..',
  '.wwwrgrgwwwww..',
  '.wwwwwwwwwww...',
  '.www.....www...',
  '.ww.......ww...',
  '.ww.......ww...',
  '.ww.......ww...',
];

/** Lays one chart over another; its dots show what is below. */
function over(below: readonly string[], above: readonly string[], left: number, top: number): string[] {
  return below.map((row, y) => {
    const laid = above[y - top];
    if (laid === undefined) return row;
    return Array.from(row, (wool, x) => {
      const own = laid[x - left] ?? '.';
      return own === '.' ? wool : own;
    }).join('');
  });
}

/** The plateau as a cloth: sky, stepped mountains under a stepped sun, grass, a llama and her cria, a running stair. */
function plateau(): string[] {
  const wide = 72;
  const high = 34;
  const stair = ['iiiiii', 'rrrrri', 'rriiri', 'rririi', 'rrirrr'];
  const ground = high - stair.length - 1;
  const peaks = [
    { at: 12, top: 9, snow: 4 },
    { at: 60, top: 11, snow: 3 },
    { at: 35, top: 5, snow: 5 },
  ];
  let rows = Array.from({ length: high }, (_, y) =>
    Array.from({ length: wide }, (_, x) => {
      if (y === 0 || y === high - 1) return 'r';
      if (y > ground) return stair[y - ground - 1]?.[x % 6] ?? 'r';
      if (y >= ground - 1) return (x * 5 + y * 3) % 7 < 2 ? 'i' : 'h'; // grass in tufts
      for (const peak of peaks) {
        const down = y - peak.top;
        const half = 1 + Math.floor(down / 2) * 2; // mountains go down in stairs of two
        if (down < 0 || Math.abs(x - peak.at) > half) continue;
        return down < peak.snow - (x % 4 < 2 ? 1 : 0) ? 's' : x > peak.at + 1 ? 'n' : 'm';
      }
      return 'k';
    }).join(''),
  );
  rows = over(rows, ['...i...', '..iii..', '.iiiii.', 'iiiiiii', '.iiiii.', '..iii..', '...i...'], 47, 3);
  rows = over(rows, LLAMA, 38, ground + 1 - LLAMA.length);
  return over(rows, BABY, 24, ground + 1 - BABY.length);
}

const PLATEAU = plateau();

export function Plateau(): VNode {
  return <Chart rows={PLATEAU} className="plateau" />;
}

/** The mark: a cria in plain squares, which hold at sixteen pixels where stitches would not. */
export function Mark(): VNode {
  const d = BABY.flatMap((row, y) => Array.from(row, (wool, x) => (wool === '.' ? '' : `M${x + 1} ${y}h1v1h-1z`))).join('');
  return (
    <svg class="mark" viewBox="0 0 12 12" aria-hidden="true" shape-rendering="crispEdges">
      <path d={d} />
    </svg>
  );
}
