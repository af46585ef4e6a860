/**
 * Where conversations are kept: this browser's IndexedDB. Where that is shut (private windows of some browsers), they
 * live until the page is closed, and the page says so.
 *
 * Not here: what is kept, see tree.ts. Nothing is ever sent to a server.
 */

import { readConversation } from './exchange';
import { joined } from './tree';
import type { Conversation } from './tree';

const STORE = 'conversations';

function settled<T>(request: IDBRequest<T>): Promise<T> {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

function committed(transaction: IDBTransaction): Promise<void> {
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve();
    transaction.onabort = transaction.onerror = () => reject(transaction.error);
  });
}

/** What is kept, if it is a conversation. */
function legible(found: unknown): Conversation | null {
  if (found === undefined) return null;
  try {
    return readConversation(found, 'a kept conversation');
  } catch (error) {
    console.warn('A kept conversation cannot be read.', error);
    return null;
  }
}

export class Shelf {
  private constructor(private readonly base: IDBDatabase | null) {}

  get lasting(): boolean {
    return this.base !== null;
  }

  static async open(): Promise<Shelf> {
    try {
      const request = indexedDB.open('puna', 1);
      request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: 'id' });
      const base = await settled(request);
      base.onversionchange = () => base.close(); // a newer page in another tab must not wait for this one
      return new Shelf(base);
    } catch (error) {
      console.warn('IndexedDB cannot be used, so nothing outlives this page.', error);
      return new Shelf(null);
    }
  }

  /** What is kept. What cannot be read is left where it is, and not shown. */
  async all(): Promise<Conversation[]> {
    if (!this.base) return [];
    const found: unknown[] = await settled(this.base.transaction(STORE).objectStore(STORE).getAll());
    return found.map(legible).filter((each) => each !== null);
  }

  async one(id: string): Promise<Conversation | null> {
    if (!this.base) return null;
    const found: unknown = await settled(this.base.transaction(STORE).objectStore(STORE).get(id));
    return legible(found);
  }

  /**
   * Keeps these; one transaction, so that an import is kept whole or not at all. Turns that another tab has kept
   * meanwhile stay, but for those in `gone`.
   */
  async keep(which: readonly Conversation[], gone: ReadonlySet<string> = new Set()): Promise<void> {
    if (!this.base) return;
    const transaction = this.base.transaction(STORE, 'readwrite');
    const store = transaction.objectStore(STORE);
    for (const each of which) {
      const asked = store.get(each.id);
      asked.onsuccess = () => {
        const before = legible(asked.result);
        store.put(before ? joined(each, { ...before, turns: before.turns.filter((one) => !gone.has(one.id)) }) : each);
      };
    }
    await committed(transaction);
  }

  async forget(id: string): Promise<void> {
    if (!this.base) return;
    const transaction = this.base.transaction(STORE, 'readwrite');
    transaction.objectStore(STORE).delete(id);
    await committed(transaction);
  }
}
