"use strict";
/* Numbers and names for people. */

const SCALES = [
  [1e12, "T"],
  [1e9, "G"],
  [1e6, "M"],
  [1e3, "k"],
];

/** 1834567 as "1.83 M". */
function short(number) {
  for (const [scale, letter] of SCALES) {
    if (Math.abs(number) >= 0.9995 * scale) return `${threeDigits(number / scale)} ${letter}`;
  }
  return threeDigits(number);
}

function threeDigits(number) {
  if (Number.isInteger(number) && Math.abs(number) < 1000) return String(number);
  return Math.abs(number) >= 99.95 ? number.toFixed(0) : Number(number.toPrecision(3)).toString();
}

function bytes(number) {
  return `${short(number)}B`.replace(/(\d)B$/, "$1 B");
}

function milliseconds(number) {
  return `${number >= 100 ? number.toFixed(0) : Number(number.toPrecision(2)).toString()} ms`;
}

function duration(seconds) {
  return seconds >= 1 ? `${seconds.toFixed(1)} s` : milliseconds(seconds * 1e3);
}

function percent(share) {
  return share >= 0.0995 ? `${(100 * share).toFixed(0)} %` : `${(100 * share).toFixed(1)} %`;
}

function exactly(number) {
  return Math.round(number).toLocaleString("en").replaceAll(",", "\u202f");
}

function counted(count, noun) {
  return `${exactly(count)} ${noun}${count === 1 ? "" : "s"}`;
}

/** A text of at most `length` characters; of a path, the end is what matters. */
function shortened(text, length, keepEnd = false) {
  if (text.length <= length) return text;
  return keepEnd ? `…${text.slice(1 - length)}` : `${text.slice(0, length - 1)}…`;
}
