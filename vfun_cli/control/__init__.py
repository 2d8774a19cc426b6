"""Control clips: what a video shows as edges, depth or skeletons, frame for frame. See docs/data.md, Control clips."""
