package report

import (
	"slices"
	"time"
)

// maxBins bounds a series, so that it fits a chart.
const maxBins = 120

// widths of the bins of a series. Each is a multiple of the one before, so bins
// join without remainder.
var widths = []time.Duration{
	time.Second, 5 * time.Second, 15 * time.Second, time.Minute, 5 * time.Minute, 15 * time.Minute, time.Hour, 3 * time.Hour, 6 * time.Hour, 12 * time.Hour, 24 * time.Hour,
}

// bin is what happened in one stretch of time: of permits, denials and events
// their sums, of a limit the highest value.
type bin struct {
	at    int // its place, in widths from the series' begin
	sum   [3]float64
	high  float64
	count int
}

// series is something over time. Times do not go back.
type series struct {
	begin time.Time
	width time.Duration
	bins  []bin // those with something in them
}

func (s *series) add(t time.Time, which int, v float64) {
	t = t.UTC()
	if s.width == 0 {
		s.width, s.begin = widths[0], t.Truncate(widths[0])
	}
	for t.Sub(s.begin) >= maxBins*s.width {
		s.widen()
	}
	s.put(bin{at: int(t.Sub(s.begin) / s.width), high: v, count: 1}, which, v)
}

func (s *series) put(b bin, which int, v float64) {
	b.sum[which] += v
	if n := len(s.bins); n > 0 && s.bins[n-1].at == b.at {
		last := &s.bins[n-1]
		for i := range last.sum {
			last.sum[i] += b.sum[i]
		}
		last.high, last.count = max(last.high, b.high), last.count+b.count
		return
	}
	s.bins = append(s.bins, b)
}

// widen joins bins to the next width.
func (s *series) widen() {
	next := 2 * s.width
	if i := slices.Index(widths, s.width); i >= 0 && i+1 < len(widths) {
		next = widths[i+1]
	}
	begin, old, width := s.begin.Truncate(next), s.bins, s.width
	offset := int(s.begin.Sub(begin) / width)
	s.begin, s.width, s.bins = begin, next, nil
	for _, b := range old {
		b.at = (b.at + offset) / int(next/width)
		s.put(b, 0, 0)
	}
}
