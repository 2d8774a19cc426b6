"use strict";
// The page reads without this: it adds values under the pointer, and videos of a row that play together.

for (const svg of document.querySelectorAll("svg[data-plot]")) {
  const plot = JSON.parse(svg.dataset.plot);
  const [left, top, right, bottom] = plot.box;
  const cursor = document.createElementNS("http://www.w3.org/2000/svg", "line");
  cursor.classList.add("cursor");
  const values = document.createElement("div");
  values.className = "values";

  const nearest = (points, x) =>
    points.reduce((best, point) => (Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best));

  svg.addEventListener("pointermove", (event) => {
    const frame = svg.getBoundingClientRect();
    const scale = svg.viewBox.baseVal.width / frame.width;
    const across = ((event.clientX - frame.left) * scale - left) / (right - left);
    const wanted = plot.x[0] + Math.min(Math.max(across, 0), 1) * (plot.x[1] - plot.x[0]);
    const found = plot.curves.map((curve) => nearest(curve.points, wanted));
    const x = nearest(found, wanted)[0];
    const at = left + ((x - plot.x[0]) / (plot.x[1] - plot.x[0])) * (right - left);
    for (const [name, value] of Object.entries({ x1: at, x2: at, y1: top, y2: bottom })) cursor.setAttribute(name, value);
    svg.append(cursor);

    values.replaceChildren(Object.assign(document.createElement("b"), { textContent: `${plot.unit} ${x.toLocaleString("en")}` }));
    plot.curves.forEach((curve, index) => {
      const line = document.createElement("span");
      line.className = `key ${curve.role}`;
      line.append(`${curve.name} `, Object.assign(document.createElement("b"), { textContent: found[index][2] }));
      values.append(line);
    });
    svg.parentElement.append(values);
    const place = at / scale;
    const beside = place + 14 + values.offsetWidth > frame.width ? place - 14 - values.offsetWidth : place + 14;
    values.style.left = `${beside}px`;
    values.style.top = `${frame.top - svg.parentElement.getBoundingClientRect().top + top / scale}px`;
  });
  svg.addEventListener("pointerleave", () => {
    cursor.remove();
    values.remove();
  });
}

for (const row of document.querySelectorAll(".samples tbody tr")) {
  const videos = [...row.querySelectorAll("video")];
  if (!videos.length) continue;
  const button = Object.assign(document.createElement("button"), { type: "button", textContent: "▶ play row" });
  const show = () => (button.textContent = videos.some((video) => !video.paused) ? "❚❚ stop row" : "▶ play row");
  button.addEventListener("click", () => {
    const playing = videos.some((video) => !video.paused);
    for (const video of videos) {
      if (playing) video.pause();
      else {
        video.currentTime = 0;
        video.play();
      }
    }
  });
  for (const video of videos) {
    video.addEventListener("play", show);
    video.addEventListener("pause", show);
    // Controls cover much of a small video, so they are there while it is pointed at.
    video.controls = false;
    video.tabIndex = 0;
    for (const event of ["pointerenter", "focus"]) video.addEventListener(event, () => (video.controls = true));
    for (const event of ["pointerleave", "blur"]) video.addEventListener(event, () => (video.controls = false));
  }
  // The first video leads: another that is off by more than a tenth of a second goes where it is.
  videos[0].addEventListener("timeupdate", () => {
    for (const video of videos.slice(1)) {
      const wanted = video.duration ? videos[0].currentTime % video.duration : 0;
      if (!video.paused && Math.abs(video.currentTime - wanted) > 0.1) video.currentTime = wanted;
    }
  });
  row.querySelector("th").append(button);
}
