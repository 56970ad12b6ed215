document.addEventListener("click", function (event) {
  var veil = event.target.closest("button.veil");
  if (!veil) return;
  var shown = veil.getAttribute("aria-pressed") !== "true";
  veil.setAttribute("aria-pressed", String(shown));
});
