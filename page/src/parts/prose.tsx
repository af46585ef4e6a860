/**
 * Markdown on the screen: each node of markdown.ts becomes one element. No HTML string is ever handed to the browser.
 *
 * Surprising: a block that did not change is not drawn again, so that a long answer keeps its selection while it grows.
 */

import { Component, createElement } from 'preact';
import type { ComponentChildren, VNode } from 'preact';
import { useMemo, useState } from 'preact/hooks';
import { Icon } from '../icons';
import { highlight } from '../highlight';
import { read } from '../markdown';
import type { Block, Node } from '../markdown';
import { tell } from '../state';

export async function copy(text: string): Promise<boolean> {
  try {
    if (navigator.clipboard) await navigator.clipboard.writeText(text);
    else {
      // Without TLS browsers have no clipboard but the old way: select, and copy what is selected.
      const field = document.createElement('textarea');
      field.value = text;
      field.className = 'unseen';
      (document.querySelector('dialog[open]') ?? document.body).append(field);
      field.select();
      const done = document.execCommand('copy');
      field.remove();
      if (!done) throw new Error('the browser did not copy');
    }
    return true;
  } catch (error) {
    console.warn(error);
    tell('The browser does not let this page copy. Select the text and copy it by hand.');
    return false;
  }
}

export function CopyButton({ text, what }: { text: string; what: string }): VNode {
  const [done, setDone] = useState(false);
  const press = async (): Promise<void> => {
    if (!(await copy(text))) return;
    setDone(true);
    setTimeout(() => setDone(false), 1600);
  };
  return (
    <button type="button" class="quiet copy" onClick={() => void press()} aria-label={done ? 'Copied' : `Copy ${what}`}>
      <Icon name={done ? 'check' : 'copy'} />
      <span>{done ? 'Copied' : 'Copy'}</span>
    </button>
  );
}

export function Code({ text, language }: { text: string; language: string }): VNode {
  const pieces = useMemo(() => highlight(text, language), [text, language]);
  const bare = text.replace(/\n$/, '');
  return (
    <figure class="code">
      <figcaption>
        <span>{language || 'text'}</span>
        <CopyButton text={bare} what="this code" />
      </figcaption>
      <pre tabIndex={0}>
        <code>{pieces ? pieces.map((one) => (one.kind ? <span class={one.kind}>{one.text}</span> : one.text)) : text}</code>
      </pre>
    </figure>
  );
}

function draw(node: Node): ComponentChildren {
  if (typeof node === 'string') return node;
  if (node.kind === 'fence') return <Code text={node.text} language={node.language} />;
  const children = node.children.map(draw);
  switch (node.kind) {
    case 'group':
      return children;
    case 'a':
      return (
        <a href={node.href ?? ''} target="_blank" rel="noopener noreferrer nofollow">
          {children}
        </a>
      );
    case 'table':
      return (
        <div class="wide" tabIndex={0} role="group" aria-label="Table">
          <table>{children}</table>
        </div>
      );
    case 'h1':
    case 'h2':
    case 'h3':
    case 'h4':
    case 'h5':
    case 'h6': {
      // The page's own headings are of the first and second level; those of an answer come below them, however they begin.
      const level = Number(node.kind[1]);
      return createElement('h' + Math.min(6, (node.depth ?? level) + 2), { class: 'level-' + level }, children);
    }
    case 'ol':
      return <ol {...(node.start === undefined ? {} : { start: node.start })}>{children}</ol>;
    case 'th':
    case 'td':
      return createElement(node.kind, node.align ? { class: node.align } : null, children);
    case 'hr':
    case 'br':
      return createElement(node.kind, null);
    default:
      return createElement(node.kind, null, children);
  }
}

class Drawn extends Component<{ block: Block }> {
  override shouldComponentUpdate(next: { block: Block }): boolean {
    return next.block.source !== this.props.block.source;
  }

  override render({ block }: { block: Block }): ComponentChildren {
    return draw(block.node);
  }
}

export function Prose({ text }: { text: string }): VNode {
  const blocks = useMemo(() => read(text), [text]);
  return (
    <div class="prose">
      {blocks.map((block, at) => (
        <Drawn key={at} block={block} />
      ))}
    </div>
  );
}
