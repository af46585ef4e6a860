/**
 * Builds the page into the Python package, the same bytes for the same sources.
 *
 * Surprising: the build carries a hash of what it was made from, which a test in Python computes again without Node, so
 * that a page older than its sources is noticed. What is hashed is said in one place more, tests/page/test_built_page.py.
 */

import { createHash } from 'node:crypto';
import { readdirSync, readFileSync } from 'node:fs';
import { dirname, join, posix } from 'node:path';
import { fileURLToPath } from 'node:url';
import type { Plugin } from 'vite';
import { defineConfig } from 'vitest/config';

const here = fileURLToPath(new URL('.', import.meta.url));

/** Files that decide what is built: sources, settings and the lockfile, in the order of their names. */
function sources(folder = ''): string[] {
  return readdirSync(join(here, folder), { withFileTypes: true })
    .filter((entry) => folder !== '' || ['src', 'index.html', 'package.json', 'package-lock.json', 'tsconfig.json', 'vite.config.ts'].includes(entry.name))
    .flatMap((entry) => {
      const name = posix.join(folder, entry.name);
      return entry.isDirectory() ? sources(name) : [name];
    })
    .sort((one, other) => (one < other ? -1 : 1));
}

function signed(): Plugin {
  return {
    name: 'puna-signed',
    transformIndexHtml: {
      order: 'post',
      handler: (html) => {
        const hash = createHash('sha256');
        for (const name of sources()) {
          const content = readFileSync(join(here, name));
          hash.update(`${name}\0${content.length}\0`).update(content);
        }
        return html.replace('</title>', `</title>\n    <meta name="puna-sources" content="${hash.digest('hex')}" />`);
      },
    },
  };
}

/** The licences of all that is bundled, which ask to go along with it. */
function licences(): Plugin {
  return {
    name: 'puna-licences',
    generateBundle(_options, bundle) {
      const found = new Map<string, string>();
      for (const chunk of Object.values(bundle)) {
        if (chunk.type !== 'chunk') continue;
        for (const [id, { renderedLength }] of Object.entries(chunk.modules)) {
          if (renderedLength === 0 || !id.includes('/node_modules/')) continue;
          let folder = dirname(id.replace(/^\0/, '').replace(/\?.*$/, ''));
          while (!/\/node_modules\/(@[^/]+\/)?[^/]+$/.test(folder)) folder = dirname(folder);
          const { name, version, license } = JSON.parse(readFileSync(join(folder, 'package.json'), 'utf8')) as Record<string, string>;
          const text = readdirSync(folder).find((file) => /^licen[cs]e/i.test(file));
          if (text === undefined) this.error(`${name} has no licence file`);
          found.set(`${name} ${version} (${license})`, readFileSync(join(folder, text), 'utf8').trim());
        }
      }
      const parts = [...found].sort(([one], [other]) => (one < other ? -1 : 1)).map(([head, text]) => `${head}\n\n${text}\n`);
      const intro = 'The page contains code of these projects:\n\n';
      this.emitFile({ type: 'asset', fileName: 'licences.txt', source: intro + parts.join('\n' + '-'.repeat(80) + '\n\n') });
    },
  };
}

export default defineConfig({
  base: '/page/',
  plugins: [signed(), licences()],
  server: { proxy: { '^/(v1|puna|version)': process.env['PUNA_URL'] ?? 'http://127.0.0.1:8080' } }, // `npm run dev`
  esbuild: { jsx: 'automatic', jsxImportSource: 'preact', legalComments: 'none' },
  build: {
    target: ['chrome123', 'edge123', 'firefox120', 'safari17.5'], // the first with light-dark() in style sheets
    outDir: '../src/puna/server/page',
    emptyOutDir: true,
    assetsDir: '',
    assetsInlineLimit: 0, // nothing as a data: address
    modulePreload: { polyfill: false },
    rollupOptions: { output: { entryFileNames: 'puna-[hash].js', assetFileNames: 'puna-[hash][extname]' } },
  },
  test: { include: ['tests/**/*.test.ts'], environment: 'node' },
});
