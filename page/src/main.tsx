/** Begins: styles, the page, what is kept, the server. */

import { render } from 'preact';
import { App } from './app';
import { start } from './state';
import './styles/base.css';
import './styles/page.css';
import './styles/prose.css';

const root = document.getElementById('root');
if (root) render(<App />, root);
void start();
