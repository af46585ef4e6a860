/** Numbers as people read them. Not here: anything about the screen. */

const whole = new Intl.NumberFormat('en');

/** 5240 → "5,240"; below ten with one digit after the point. */
export function count(value: number): string {
  if (!Number.isFinite(value)) return '–';
  return whole.format(value < 10 && value % 1 !== 0 ? Math.round(value * 10) / 10 : Math.round(value));
}

/** Bytes in powers of ten, as disks and model files are sold: 1_234_000_000 → "1.2 GB". */
export function bytes(value: number): string {
  for (const [unit, size] of [['TB', 1e12], ['GB', 1e9], ['MB', 1e6], ['kB', 1e3]] as const)
    if (value >= size) return (value / size >= 100 ? Math.round(value / size) : (value / size).toFixed(1)) + ' ' + unit;
  return value + ' B';
}

/** Parameters: 1_235_814_400 → "1.2 B", 260_000 → "260 K". */
export function parameters(value: number): string {
  for (const [unit, size] of [['T', 1e12], ['B', 1e9], ['M', 1e6], ['K', 1e3]] as const)
    if (value >= size) return Number((value / size).toPrecision(value / size >= 100 ? 3 : 2)) + ' ' + unit;
  return String(value);
}

/** Seconds: 0.012 → "12 ms", 3.21 → "3.2 s", 75 → "1 min 15 s", 7500 → "2 h 5 min". */
export function duration(seconds: number): string {
  if (seconds < 0.9995) return Math.max(0, Math.round(seconds * 1000)) + ' ms';
  if (seconds < 59.95) return seconds.toFixed(1) + ' s';
  const rounded = Math.round(seconds);
  if (rounded < 3600) return Math.floor(rounded / 60) + ' min ' + (rounded % 60) + ' s';
  const minutes = Math.round(rounded / 60);
  if (minutes < 2880) return Math.floor(minutes / 60) + ' h ' + (minutes % 60) + ' min';
  return Math.floor(minutes / 1440) + ' days ' + Math.floor((minutes % 1440) / 60) + ' h';
}

/** A moment, as a list of conversations shows it: the hour today, else the day. */
export function moment(at: number, now = Date.now()): string {
  const date = new Date(at);
  const today = new Date(now);
  if (date.toDateString() === today.toDateString())
    return date.toLocaleTimeString(undefined, { hour: '2-digit', minute: '2-digit' });
  const day: Intl.DateTimeFormatOptions = { day: 'numeric', month: 'short' };
  if (date.getFullYear() !== today.getFullYear()) day.year = 'numeric';
  return date.toLocaleDateString(undefined, day);
}

/** Tokens a second of an answer: those after the first one, over the time they took. 0 where that cannot be told. */
export function speed(cost: { made: number; first: number; seconds: number }): number {
  const spent = cost.seconds - cost.first;
  if (cost.made > 1 && spent > 0) return (cost.made - 1) / spent;
  return cost.made > 0 && cost.seconds > 0 ? cost.made / cost.seconds : 0;
}
