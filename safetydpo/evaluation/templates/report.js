(function () {
  "use strict";
  var status = document.getElementById("veil-status");

  function isShown(button) { return button.getAttribute("aria-pressed") === "true"; }

  function setShown(button, shown) {
    if (isShown(button) === shown) return;
    var image = button.querySelector("img"), other = image.dataset.other;
    image.dataset.other = image.getAttribute("src");
    image.setAttribute("src", other);
    button.setAttribute("aria-pressed", String(shown));
  }

  function update() {
    var shown = 0;
    document.querySelectorAll("button.veil").forEach(function (button) { if (isShown(button)) shown += 1; });
    document.querySelectorAll("button.unveil").forEach(function (button) {
      var all = Array.from(document.querySelectorAll("#" + button.dataset.sheet + " button.veil"));
      button.setAttribute("aria-pressed", String(all.every(isShown)));
    });
    if (status) status.textContent = shown ? shown + " pictures are shown. Escape veils them." : "All are veiled.";
  }

  function veilAll() {
    document.querySelectorAll("button.veil").forEach(function (button) { setShown(button, false); });
    update();
  }

  document.addEventListener("click", function (event) {
    var one = event.target.closest("button.veil"), many = event.target.closest("button.unveil");
    if (one) setShown(one, !isShown(one));
    if (many) {
      var shown = !isShown(many);
      document.querySelectorAll("#" + many.dataset.sheet + " button.veil").forEach(function (button) {
        setShown(button, shown);
      });
    }
    if (one || many) update();
  });
  document.addEventListener("keydown", function (event) { if (event.key === "Escape") veilAll(); });

  var opened = [];
  window.addEventListener("beforeprint", function () {
    veilAll();
    opened = Array.from(document.querySelectorAll("details:not([open]):not(.long)"));
    opened.forEach(function (part) { part.open = true; });
  });
  window.addEventListener("afterprint", function () {
    opened.forEach(function (part) { part.open = false; });
  });
})();
