// A formula in a sentence that is wider than its column gets a line of its own, which scrolls (see custom.css).
addEventListener("load", () => window.MathJax?.startup.promise.then(() => {
  for (const formula of document.querySelectorAll("span.math")) {
    const column = formula.closest("p, li, dd, td, h1, h2, h3").clientWidth;
    formula.classList.toggle("wide", formula.getBoundingClientRect().width > column);
  }
}));
