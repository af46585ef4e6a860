/**
 * Markdown, read into a small tree that holds nothing dangerous. What a model writes is a stranger's text.
 *
 * No HTML is made anywhere, neither here nor on the way to the screen: a node is one of the kinds below and becomes one
 * element with no attribute but a checked address. HTML in the text is text. Links go to http, https and mailto only;
 * pictures become links, since loading one would tell its server who reads. Surprising: text beyond LONGEST is not read as
 * Markdown at all, so that no text can hold the page up.
 */

import markdownit from 'markdown-it';
import type { Token } from 'markdown-it';

export type Kind =
  | 'p' | 'h1' | 'h2' | 'h3' | 'h4' | 'h5' | 'h6' | 'blockquote' | 'ul' | 'ol' | 'li' | 'hr' | 'em' | 'strong' | 's' | 'br'
  | 'code' | 'table' | 'thead' | 'tbody' | 'tr' | 'th' | 'td' | 'a' | 'group';

export type Node =
  | string
  | { kind: Kind; children: Node[]; href?: string; start?: number; align?: 'left' | 'center' | 'right'; depth?: number }
  | { kind: 'fence'; language: string; text: string };

/** A top-level block and the lines it was read from, which say whether it changed. */
export interface Block {
  source: string;
  node: Node;
}

/** In UTF-16 units. A long answer is a tenth of it. */
export const LONGEST = 300_000;

/** How many elements lie within one another, of blocks and again of words; what lies deeper stands in the deepest one. */
export const DEEPEST = 32;

const reader = markdownit({ html: false, linkify: true, typographer: false });
reader.linkify.set({ fuzzyLink: false, fuzzyEmail: false, fuzzyIP: false });
reader.validateLink = (url) => safe(url) !== null;

/** The address if it may be followed; null for anything but http, https and mailto. */
export function safe(url: string): string | null {
  let parsed: URL;
  try {
    parsed = new URL(url.trim()); // without a base: an address relative to the page is none
  } catch {
    return null;
  }
  return ['http:', 'https:', 'mailto:'].includes(parsed.protocol) ? parsed.href : null;
}

const ELEMENTS: Record<string, Kind> = {
  paragraph: 'p', blockquote: 'blockquote', bullet_list: 'ul', ordered_list: 'ol', list_item: 'li', em: 'em', strong: 'strong',
  s: 's', table: 'table', thead: 'thead', tbody: 'tbody', tr: 'tr', th: 'th', td: 'td',
};
const HEADINGS = new Set(['h1', 'h2', 'h3', 'h4', 'h5', 'h6']);

function kindOf(token: Token): Kind {
  if (token.hidden) return 'group'; // the paragraph of a tight list
  if (HEADINGS.has(token.tag)) return token.tag as Kind;
  return ELEMENTS[token.type.replace(/_open$/, '')] ?? 'group';
}

type Branch = Extract<Node, { kind: Kind }>;

function tree(tokens: readonly Token[]): Node[] {
  const root: Branch = { kind: 'group', children: [] };
  const open: Branch[] = [root];
  for (const token of tokens) {
    const here = open.at(-1) ?? root;
    if (token.nesting === 1 && open.length > DEEPEST) open.push(here); // so that its end closes nothing else
    else if (token.nesting === 1) {
      const made: Branch = { kind: kindOf(token), children: [] };
      if (token.type === 'link_open') {
        const href = safe(String(token.attrGet('href') ?? ''));
        if (href !== null) Object.assign(made, { kind: 'a', href });
      }
      if (token.type === 'ordered_list_open') {
        const start = Number(token.attrGet('start') ?? 1);
        if (Number.isSafeInteger(start) && start !== 1) made.start = start;
      }
      const align = /text-align:(left|center|right)/.exec(String(token.attrGet('style') ?? ''))?.[1];
      if (align === 'left' || align === 'center' || align === 'right') made.align = align;
      here.children.push(made);
      open.push(made);
    } else if (token.nesting === -1) {
      if (open.length > 1) open.pop();
    } else if (token.type === 'inline') here.children.push(...tree(token.children ?? []));
    else if (token.type === 'fence' || token.type === 'code_block')
      here.children.push({ kind: 'fence', language: token.info.trim().split(/\s/, 1)[0] ?? '', text: token.content });
    else if (token.type === 'code_inline') here.children.push({ kind: 'code', children: [token.content] });
    else if (token.type === 'hr') here.children.push({ kind: 'hr', children: [] });
    else if (token.type === 'hardbreak') here.children.push({ kind: 'br', children: [] });
    else if (token.type === 'softbreak') here.children.push('\n');
    else if (token.type === 'image') {
      const href = safe(String(token.attrGet('src') ?? ''));
      const said = 'picture: ' + (token.content || 'without a description');
      here.children.push(href === null ? said : { kind: 'a', href, children: [said] });
    } else if (token.content) here.children.push(token.content);
  }
  return root.children;
}

/**
 * Says of each heading how deep it lies, 1 and up: models begin with any level and leave some out, and who reads by
 * headings alone would look for what was left out. `above`: the levels of the headings that the next one may lie under.
 */
function outline(node: Node, above: number[]): void {
  if (typeof node === 'string' || node.kind === 'fence') return;
  if (HEADINGS.has(node.kind)) {
    const level = Number(node.kind[1]);
    while ((above.at(-1) ?? 0) >= level) above.pop();
    above.push(level);
    node.depth = above.length;
  } else for (const each of node.children) outline(each, above);
}

/** The blocks of a text, in order. */
export function read(text: string): Block[] {
  if (text.length > LONGEST) return [{ source: text, node: { kind: 'fence', language: '', text } }];
  const env = {};
  const tokens = reader.parse(text, env);
  // Definitions of links stand anywhere and change what other blocks mean, so each block's source tells of them.
  const references = JSON.stringify((env as { references?: unknown }).references ?? null);
  const lines = text.split('\n');
  const blocks: Block[] = [];
  let from = 0;
  let depth = 0;
  const above: number[] = [];
  tokens.forEach((token, at) => {
    depth += token.nesting;
    if (depth !== 0) return;
    const first = tokens[from];
    const [begin, end] = first?.map ?? [0, 0];
    const [node] = tree(tokens.slice(from, at + 1));
    if (node !== undefined) outline(node, above);
    if (node !== undefined) blocks.push({ source: lines.slice(begin, end).join('\n') + '\u0000' + references, node });
    from = at + 1;
  });
  return blocks;
}
