/**
 * Code in colour: highlight.js with the languages that people ask models for, as a tree of elements instead of HTML.
 *
 * Not here: the colours, see styles/code.css. Surprising: the language is never guessed, since guessing runs every
 * grammar over the text; code without a name, or with one that is unknown here, stays plain.
 */

import { createLowlight } from 'lowlight';
import bash from 'highlight.js/lib/languages/bash';
import cpp from 'highlight.js/lib/languages/cpp';
import css from 'highlight.js/lib/languages/css';
import diff from 'highlight.js/lib/languages/diff';
import go from 'highlight.js/lib/languages/go';
import ini from 'highlight.js/lib/languages/ini';
import java from 'highlight.js/lib/languages/java';
import javascript from 'highlight.js/lib/languages/javascript';
import json from 'highlight.js/lib/languages/json';
import markdown from 'highlight.js/lib/languages/markdown';
import python from 'highlight.js/lib/languages/python';
import rust from 'highlight.js/lib/languages/rust';
import sql from 'highlight.js/lib/languages/sql';
import typescript from 'highlight.js/lib/languages/typescript';
import xml from 'highlight.js/lib/languages/xml';
import yaml from 'highlight.js/lib/languages/yaml';

const lowlight = createLowlight({
  bash, cpp, css, diff, go, ini, java, javascript, json, markdown, python, rust, sql, typescript, xml, yaml,
});
lowlight.registerAlias({ cpp: ['c', 'h', 'cuda'], bash: ['shell', 'console', 'zsh'], json: ['jsonl', 'json5'] });

/**
 * Longer code, or code with a longer line, stays plain: colour is not worth a page that stands still. Some grammars take
 * time that grows with the square of the text: C++ on 30,000 letters, a word a line, was measured at three seconds.
 */
export const LONGEST = 12_000;
export const LONGEST_LINE = 1_000;

export interface Piece {
  /** Class names, `hljs-keyword` and the like; '' for plain text. */
  kind: string;
  text: string;
}

type Tree = ReturnType<typeof lowlight.highlight>['children'][number];

/** `code` cut into pieces of one colour each; null where it stays plain. */
export function highlight(code: string, language: string): Piece[] | null {
  const name = language.toLowerCase();
  if (!name || code.length > LONGEST || !lowlight.registered(name)) return null;
  if (code.split('\n').some((line) => line.length > LONGEST_LINE)) return null;
  const pieces: Piece[] = [];
  // By hand instead of by calls: brackets in some languages nest the tree as deep as the text is long.
  const open: [Tree, string][] = lowlight.highlight(name, code).children.map((node): [Tree, string] => [node, '']).reverse();
  for (let next = open.pop(); next; next = open.pop()) {
    const [node, kind] = next;
    if (node.type === 'text') pieces.push({ kind, text: node.value });
    else if (node.type === 'element') {
      const names = node.properties['className'];
      const inner = Array.isArray(names) ? names.join(' ') : kind;
      for (let at = node.children.length - 1; at >= 0; at--) {
        const child = node.children[at];
        if (child) open.push([child, inner]);
      }
    }
  }
  return pieces;
}
