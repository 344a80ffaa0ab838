// A table that is wider than the page scrolls sideways in its wrapper. This says so, above the table.
(() => {
  const mark = () => {
    for (const wrapper of document.querySelectorAll(".table-wrapper")) {
      wrapper.classList.toggle("scrolls", wrapper.scrollWidth > wrapper.clientWidth + 1);
    }
  };
  addEventListener("load", mark);
  addEventListener("resize", mark);
})();
