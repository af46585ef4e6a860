/** Hostile Markdown: whatever a text says, the tree holds known kinds and checked addresses only, and is there in time. */

import { expect, test } from 'vitest';
import { highlight, LONGEST as LONGEST_CODE } from '../src/highlight';
import { DEEPEST, LONGEST, read, safe } from '../src/markdown';
import type { Node } from '../src/markdown';

const KINDS = new Set([
  'p', 'h1', 'h2', 'h3', 'h4', 'h5', 'h6', 'blockquote', 'ul', 'ol', 'li', 'hr', 'em', 'strong', 's', 'br', 'code', 'table', 'thead',
  'tbody', 'tr', 'th', 'td', 'a', 'group', 'fence',
]);
const FIELDS = new Set(['kind', 'children', 'href', 'start', 'align', 'depth', 'language', 'text']);

/** Everything in a tree, after checking that it may be there. */
function all(text: string): Exclude<Node, string>[] {
  const found: Exclude<Node, string>[] = [];
  const open: Node[] = read(text).map((block) => block.node);
  while (open.length) {
    const node = open.pop();
    if (node === undefined || typeof node === 'string') continue;
    expect(KINDS).toContain(node.kind);
    for (const name of Object.keys(node)) expect(FIELDS).toContain(name);
    if ('href' in node && node.href !== undefined) expect(node.href).toMatch(/^(https?:\/\/|mailto:)/);
    found.push(node);
    if (node.kind !== 'fence') open.push(...node.children);
  }
  return found;
}

const words = (text: string): string => {
  const say = (node: Node): string => (typeof node === 'string' ? node : node.kind === 'fence' ? node.text : node.children.map(say).join(''));
  return read(text).map((block) => say(block.node)).join('\n');
};

test.each([
  '<script>alert(1)</script>',
  '<img src=x onerror=alert(1)>',
  'a <b onclick="alert(1)">b</b> c',
  '<svg><script>alert(1)</script></svg>',
  '<iframe srcdoc="<script>alert(1)</script>">',
  '<style>*{display:none}</style>',
  '<!-- comment --><![CDATA[x]]><?php x ?>',
  '<a href="x" style="position:fixed">x</a>',
  '<math><mi xlink:href="javascript:alert(1)">x</mi></math>',
])('HTML is text: %s', (text) => {
  expect(all(text).filter((node) => !['p', 'group'].includes(node.kind))).toEqual([]);
  expect(words(text)).toBe(text);
});

test.each([
  '[x](javascript:alert(1))',
  '[x](JaVaScRiPt:alert(1))',
  '[x](  javascript:alert(1))',
  '[x](java\nscript:alert(1))',
  '[x](java&#115;cript:alert(1))',
  '[x](&#x6A;avascript:alert(1))',
  '[x](javascript&colon;alert(1))',
  '[x](\u0001javascript:alert(1))',
  '[x](data:text/html,<script>alert(1)</script>)',
  '[x](data:image/svg+xml;base64,PHN2Zz4=)',
  '[x](vbscript:msgbox(1))',
  '[x](file:///etc/passwd)',
  '[x](blob:x)',
  '[x](//example.com/protocol-relative)',
  '[x](/v1/models)',
  '[x](?q#f)',
  '<javascript:alert(1)>',
  '<data:text/html,x>',
  '![x](javascript:alert(1))',
  '![x](data:image/png;base64,AAAA)',
  '[x]\n\n[x]: javascript:alert(1)',
  '![x][y]\n\n[y]: data:image/gif;base64,AAAA',
])('no address: %s', (text) => {
  expect(all(text).filter((node) => node.kind === 'a')).toEqual([]);
});

test('http, https and mailto are addresses', () => {
  const text = '[a](http://example.com) <https://example.com/b> https://example.com/c [d](mailto:d@example.com "title") [e][f]\n\n[f]: https://example.com/f';
  const found = all(text).flatMap((node) => ('href' in node ? [node.href] : []));
  expect(found.sort()).toEqual([
    'http://example.com/', 'https://example.com/b', 'https://example.com/c', 'https://example.com/f', 'mailto:d@example.com',
  ]);
});

test('an address is checked as browsers read it', () => {
  expect(safe(' https://example.com ')).toBe('https://example.com/');
  expect(safe('ht\ntps://example.com')).toBe('https://example.com/');
  expect(safe('java\tscript:alert(1)')).toBeNull();
  expect(safe('https:')).toBeNull();
  expect(safe('')).toBeNull();
});

test('a picture is a link, never a picture', () => {
  expect(all('![a *dog*](https://example.com/dog.png)')).toContainEqual({
    kind: 'a', href: 'https://example.com/dog.png', children: ['picture: a *dog*'],
  });
});

test('what Markdown has is there', () => {
  const kinds = all('# h\n\na **b** *c* ~~d~~ `e`\\\nf\n\n- g\n\n3. h\n\n> i\n\n---\n\n| j | k |\n|:-:|--:|\n| l | m |\n').map((node) => node.kind);
  for (const kind of ['h1', 'strong', 'em', 's', 'code', 'br', 'ul', 'ol', 'li', 'blockquote', 'hr', 'table', 'th', 'td']) expect(kinds).toContain(kind);
  expect(all('3. h')).toContainEqual(expect.objectContaining({ kind: 'ol', start: 3 }));
  expect(all('| j |\n|--:|\n| l |')).toContainEqual({ kind: 'td', children: ['l'], align: 'right' });
});

test('headings lie under one another without gaps, whatever their levels', () => {
  const depths = (text: string): unknown[] => read(text).flatMap(({ node }) => (typeof node === 'object' && 'depth' in node ? [node.depth] : []));
  expect(depths('## a\n\n## b\n\n#### c\n\n### d\n\n# e\n\n###### f')).toEqual([1, 1, 2, 2, 1, 2]);
});

test.each([
  ['```python\nprint(1)\n', 'python', 'print(1)\n'],
  ['````\n```js\nlet x\n```\n````', '', '```js\nlet x\n```\n'],
  ['~~~\n```\n', '', '```\n'],
  ['```html"><img src=x onerror=alert(1)>\n<b>\n```', 'html"><img', '<b>\n'],
  ['> ```\n> quoted', '', 'quoted'],
])('a fence, nested or never closed: %j', (text, language, code) => {
  expect(all(text)).toContainEqual({ kind: 'fence', language, text: code });
});

test.each([
  ['quotes', '> '.repeat(20_000) + 'x'],
  ['lists', '- '.repeat(20_000) + 'x'],
  ['brackets', '['.repeat(50_000)],
  ['brackets closed', '['.repeat(20_000) + 'a' + ']'.repeat(20_000)],
  ['images', '![['.repeat(20_000)],
  ['stars', '*a **a '.repeat(20_000)],
  ['underscores', '_'.repeat(100_000) + 'a' + '_'.repeat(100_000)],
  ['backticks', Array.from({ length: 700 }, (_, n) => '`'.repeat(n)).join(' ')],
  ['angles', '<'.repeat(100_000)],
  ['comments', '<!--'.repeat(50_000)],
  ['entities', '&#9999999;&unknown;'.repeat(15_000)],
  ['references', '[a]: /b\n'.repeat(30_000)],
  ['indents', Array.from({ length: 700 }, (_, n) => ' '.repeat(n) + '- x').join('\n')],
  ['links', 'https://a.b/'.repeat(20_000)],
  ['parentheses', 'https://a.b/' + '('.repeat(100_000)],
  ['pipes', '|'.repeat(100_000) + '\n' + '|-'.repeat(50_000)],
  ['rows', '| a | b |\n|--|--|\n' + '| a | b |\n'.repeat(20_000)],
  ['NULs', '\u0000'.repeat(200_000)],
  ['escapes', '\\*'.repeat(100_000)],
])('deep or long %s end in time', (_, text) => {
  all(text.slice(0, LONGEST)); // milliseconds; what grows with the square of the text would take minutes
}, 60_000);

test('what nests without end is flat from some depth on, and loses no word', () => {
  const depth = (node: Node): number => (typeof node === 'string' || node.kind === 'fence' ? 0 : 1 + Math.max(0, ...node.children.map(depth)));
  for (const text of ['_'.repeat(100_000) + 'a' + '_'.repeat(100_000), '*a **b '.repeat(500) + 'c' + '** d*'.repeat(500), '> '.repeat(90) + '*'.repeat(200) + 'a' + '*'.repeat(200)]) {
    expect(Math.max(...read(text).map((block) => depth(block.node)))).toBeLessThanOrEqual(2 * DEEPEST + 2);
    expect(words(text).replace(/[^a-d]/g, '')).toBe(text.replace(/[^a-d]/g, ''));
  }
  expect(words('*'.repeat(101) + 'a' + '*'.repeat(101) + ' b')).toContain(' b');
});

test('a megabyte is shown as it is', () => {
  const text = '**x** '.repeat(180_000);
  expect(read(text)).toEqual([{ source: text, node: { kind: 'fence', language: '', text } }]);
  expect(highlight(text, 'python')).toBeNull();
});

test('blocks know the lines they were read from, so that only what changed is drawn again', () => {
  const before = read('one\n\ntwo\n\nthr');
  const after = read('one\n\ntwo\n\nthree and');
  expect(after.map((block) => block.source).slice(0, 2)).toEqual(before.map((block) => block.source).slice(0, 2));
  expect(after[2]?.source).not.toBe(before[2]?.source);
  // a definition further down makes a link of what was text
  expect(read('[a]\n\n[a]: https://example.com')[0]?.source).not.toBe(read('[a]\n\n[a]: ')[0]?.source);
});

test('code in colour is the same code', () => {
  const code = 'def f(x: int) -> str:\n    return f"<b>{x}</b>"  # why\n';
  const pieces = highlight(code, 'Python');
  expect(pieces?.map((piece) => piece.text).join('')).toBe(code);
  expect(pieces?.find((piece) => piece.text === 'def')?.kind).toBe('hljs-keyword');
  for (const piece of pieces ?? []) expect(piece.kind).toMatch(/^(hljs-[\w-]+( [\w-]+)*)?$/);
  expect(highlight(code, 'brainfuck')).toBeNull();
  expect(highlight(code, '__proto__')).toBeNull();
  expect(highlight(code, 'constructor')).toBeNull();
  expect(highlight('x'.repeat(LONGEST_CODE + 1), 'python')).toBeNull();
});

test.each(['bash', 'c', 'cpp', 'css', 'diff', 'go', 'html', 'java', 'javascript', 'json', 'markdown', 'python', 'rust', 'sql', 'toml', 'ts', 'xml', 'yaml'])(
  '%s is known, and no odd text holds it up', (language) => {
    for (const odd of ['"', '(', '{', '[', '/*', '<a ', 'a', 'a b', '\\', '0x', '@a(', '=> (', '`']) {
      const line = odd.repeat(500).slice(0, 900) + '\n';
      for (const text of [line.repeat(13), (odd.repeat(20) + '\n').repeat(600).slice(0, LONGEST_CODE)])
        expect(highlight(text, language)?.map((piece) => piece.text).join('')).toBe(text);
    }
    expect(highlight('a'.repeat(1_001), language)).toBeNull();
  }, 60_000,
);
