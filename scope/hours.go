package scope

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

var days = []string{"mon", "tue", "wed", "thu", "fri", "sat", "sun"}

const minutesADay = 24 * 60

// week has one bit for each minute of a week in UTC, from Monday 00:00.
type week [7*minutesADay/64 + 1]uint64

func (w *week) add(h Hours) {
	from, to := minutes(h.From), minutes(h.To)
	for _, day := range h.Days {
		for m := from; m < to; m++ {
			i := slices.Index(days, day)*minutesADay + m
			w[i/64] |= 1 << (i % 64)
		}
	}
}

// has says whether t's minute is in the week.
func (w *week) has(t time.Time) bool {
	t = t.UTC()
	i := (int(t.Weekday())+6)%7*minutesADay + t.Hour()*60 + t.Minute()
	return w[i/64]&(1<<(i%64)) != 0
}

// within says whether every minute of w is in outer; nil is every minute.
func (w *week) within(outer *week) bool {
	if outer == nil {
		return true
	}
	if w == nil {
		return false
	}
	for i := range w {
		if w[i]&^outer[i] != 0 {
			return false
		}
	}
	return true
}

// minutes reads hh:mm; -1 where it is none.
func minutes(s string) int {
	if s == "24:00" {
		return minutesADay
	}
	t, err := time.Parse("15:04", s)
	if err != nil || len(s) != 5 {
		return -1
	}
	return t.Hour()*60 + t.Minute()
}

// normalise checks h and sorts its days.
func (h *Hours) normalise() error {
	from, to := minutes(h.From), minutes(h.To)
	if from < 0 || to < 0 || from >= to {
		return fmt.Errorf("from %s to %s: times such as 08:00 and 16:30 in UTC are expected, the second later; an interval over midnight is two entries", clipped(h.From), clipped(h.To))
	}
	slices.SortFunc(h.Days, func(a, b string) int { return slices.Index(days, a) - slices.Index(days, b) })
	for i, d := range h.Days {
		if !slices.Contains(days, d) {
			return fmt.Errorf("day %s: one of %s is expected", clipped(d), join(days))
		}
		if i > 0 && h.Days[i-1] == d {
			return fmt.Errorf("day %s stands twice", d)
		}
	}
	if len(h.Days) == 0 {
		return fmt.Errorf("days is empty")
	}
	return nil
}

func (h Hours) compare(o Hours) int {
	return strings.Compare(h.From+h.To+strings.Join(h.Days, ""), o.From+o.To+strings.Join(o.Days, ""))
}
