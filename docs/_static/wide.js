// Lays out what is wider than the page: tables and drawings scroll sideways and say so, lines of code are wrapped.
(() => {
  const SHORT = 20; // a word of code with no more letters is not cut
  const LONG = 30; // a cell with more letters gets a column that can be read

  // A wrapped line goes on further in than it begins, or below the text of "  policy     Cautious()".
  const hang = (pre) => {
    const lines = document.createDocumentFragment();
    for (const html of pre.innerHTML.replace(/\n$/, "").split("\n")) {
      const line = document.createElement("span");
      line.className = "line";
      line.innerHTML = `${html}\n`;
      const [start, label] = /^[+-]?\s*(\w+\s{2,})?/.exec(line.textContent.trimEnd());
      line.style.setProperty("--hang", Math.min(label ? start.length : start.length + 2, 16));
      allowBreaks(line);
      lines.append(line);
    }
    pre.replaceChildren(lines);
  };

  // The first word of a line may be cut behind a "." or "(". Otherwise a long one leaves an empty line above it.
  const allowBreaks = (line) => {
    let begun = false;
    for (const part of [...line.childNodes]) {
      const blank = part.textContent.trim() === "";
      if (begun && blank) return;
      begun ||= !blank;
      if (/[.(]$/.test(part.textContent)) part.after(document.createElement("wbr"));
    }
  };

  const mark = () => {
    for (const box of document.querySelectorAll(".table-wrapper, .highlight pre")) {
      box.classList.remove("scrolls"); // it widens columns
      box.classList.toggle("scrolls", box.scrollWidth > box.clientWidth + 1);
    }
  };

  addEventListener("load", () => {
    for (const pre of document.querySelectorAll(".highlight pre")) {
      if (getComputedStyle(pre).whiteSpace.startsWith("pre-wrap")) hang(pre);
    }
    for (const word of document.querySelectorAll("code .pre")) {
      word.classList.toggle("short", word.textContent.length <= SHORT);
    }
    for (const name of document.querySelectorAll("td code .pre:not(.short)")) {
      name.innerHTML = name.innerHTML.replace(/[_(,=./](?=\w)/g, "$&<wbr>");
    }
    for (const cell of document.querySelectorAll("td")) {
      cell.classList.toggle("long", cell.textContent.length > LONG);
    }
    mark();
  });
  addEventListener("resize", mark);
})();
