// The little Markdown that models write most: code, lists, headings, bold. Everything else is text.
// Elements are made one by one and filled with text nodes, so nothing a model writes is HTML.

const FENCE = /^\s*(`{3,}|~{3,})/;
const HEADING = /^#{1,6}\s+(.*)/;
const ITEM = /^\s*(?:[-*+]|(\d{1,9})[.)])\s+(.*)/;
const INLINE = /(`+)([^`]+)\1|\*\*(?=\S)(.+?)\*\*/g;

/** A fragment for `text`, which may end anywhere: an open code block reaches to the end. */
export function render(text) {
  const fragment = document.createDocumentFragment();
  const lines = text.split("\n");
  let paragraph = [];
  const endParagraph = () => {
    if (paragraph.length) fragment.append(element("p", paragraph.join("\n")));
    paragraph = [];
  };
  for (let at = 0; at < lines.length; at++) {
    const line = lines[at];
    const fence = FENCE.exec(line)?.[1];
    const heading = HEADING.exec(line);
    if (fence) {
      endParagraph();
      const start = at + 1;
      do at++; while (at < lines.length && !lines[at].trim().startsWith(fence));
      fragment.append(codeBlock(lines.slice(start, at).join("\n")));
    } else if (heading) {
      endParagraph();
      fragment.append(element("h3", heading[1]));
    } else if (ITEM.test(line)) {
      endParagraph();
      at = appendList(fragment, lines, at);
    } else if (line.trim()) {
      paragraph.push(line);
    } else {
      endParagraph();
    }
  }
  endParagraph();
  return fragment;
}

/** Reads items from line `at` on; returns the last line read. */
function appendList(parent, lines, at) {
  const number = ITEM.exec(lines[at])[1];
  const list = document.createElement(number === undefined ? "ul" : "ol");
  if (number !== undefined) list.start = Number(number);
  for (; at < lines.length; at++) {
    const item = ITEM.exec(lines[at]);
    if (!item || (item[1] === undefined) !== (number === undefined)) break;
    list.append(element("li", item[2]));
  }
  parent.append(list);
  return at - 1;
}

function codeBlock(text) {
  const block = document.createElement("pre");
  block.tabIndex = 0; // it may scroll
  block.append(document.createElement("code"));
  block.firstChild.textContent = text;
  return block;
}

function element(tag, text) {
  const made = document.createElement(tag);
  let end = 0;
  for (const match of text.matchAll(INLINE)) {
    made.append(text.slice(end, match.index));
    const inner = document.createElement(match[1] ? "code" : "strong");
    inner.textContent = match[2] ?? match[3];
    made.append(inner);
    end = match.index + match[0].length;
  }
  made.append(text.slice(end));
  return made;
}
