/** Line icons, drawn for this page on a grid of 20. Decoration only: each button has words of its own. */

import type { VNode } from 'preact';

const PATHS = {
  plus: 'M10 4v12M4 10h12',
  menu: 'M3 5.5h14M3 10h14M3 14.5h9',
  close: 'M5 5l10 10M15 5L5 15',
  send: 'M10 16V4M5 9l5-5 5 5',
  stop: 'M6 6h8v8H6z',
  copy: 'M7 7V3.5h9.5V13H13M3.5 7H13v9.5H3.5z',
  check: 'M4 10.5l4 4 8-9',
  again: 'M16 10a6 6 0 1 1-1.8-4.3M16 3v3.5h-3.5',
  edit: 'M4 16l.8-3.4L13 4.4l2.6 2.6-8.2 8.2z',
  left: 'M12 5l-5 5 5 5',
  right: 'M8 5l5 5-5 5',
  down: 'M10 4v12M5 11l5 5 5-5',
  more: 'M4.5 10h.01M10 10h.01M15.5 10h.01',
  dials: 'M3 6h7M14 6h3M3 14h3M10 14h7M12 4v4M8 12v4',
  engine: 'M3 16V9M7.7 16V4M12.3 16v-5M17 16V7',
  clip: 'M15.5 9.5l-5.6 5.6a3.4 3.4 0 0 1-4.8-4.8l6-6a2.3 2.3 0 0 1 3.2 3.2l-5.9 6a1.1 1.1 0 0 1-1.6-1.6l5.2-5.2',
  search: 'M8.8 14.1a5.3 5.3 0 1 1 0-10.6 5.3 5.3 0 0 1 0 10.6zM12.7 12.7L17 17',
  sun: 'M10 6.6a3.4 3.4 0 1 1 0 6.8 3.4 3.4 0 0 1 0-6.8zM10 2v1.5M10 16.5V18M2 10h1.5M16.5 10H18M4.3 4.3l1.1 1.1M14.6 14.6l1.1 1.1M4.3 15.7l1.1-1.1M14.6 5.4l1.1-1.1',
  moon: 'M16.5 12.3A7 7 0 0 1 7.7 3.5a7 7 0 1 0 8.8 8.8z',
  system: 'M3 4.5h14v9H3zM7.5 16.5h5',
  key: 'M12.6 3.5a3.9 3.9 0 1 1-3.5 5.6L3.5 14.7v1.8h2.6v-2h2v-2l2-1.9',
  out: 'M10 3v9.5M6 7l4-4 4 4M3.5 12.5v4h13v-4',
  in: 'M10 12.5V3M6 8.5l4 4 4-4M3.5 12.5v4h13v-4',
  shield: 'M10 3l6 2.2v4.3c0 3.6-2.5 6.2-6 7.5-3.5-1.3-6-3.9-6-7.5V5.2z',
  bin: 'M4 5.5h12M8 5.5V3.5h4v2M5.5 5.5l.7 11h7.6l.7-11',
} as const;

export function Icon({ name }: { name: keyof typeof PATHS }): VNode {
  return (
    <svg class={'icon icon-' + name} viewBox="0 0 20 20" aria-hidden="true">
      <path d={PATHS[name]} />
    </svg>
  );
}
