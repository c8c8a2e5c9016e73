package report

import (
	"fmt"
	"math"
	"time"
)

// chart is a drawing of 1000 by 100 units that is stretched to its place; its
// labels stand beside it as text, so that they keep their size.
type chart struct {
	Label    string // for who does not see it
	Top      string // what its upper edge means
	From, To string
	Bars     []bar
	Lines    []float64 // heights of lines across it
	Events   bool      // it has events
}

type bar struct {
	X, Y, W, H float64
	Class      string
	Title      string
}

// round keeps a page small.
func round(f float64) float64 { return math.Round(f*100) / 100 }

// span is the time that the charts of a record share.
type span struct{ from, to time.Time }

func (s span) x(t time.Time) float64 {
	return 1000 * float64(t.Sub(s.from)) / float64(s.to.Sub(s.from))
}

func (s span) labels() (from, to string) { return minute(s.from), minute(s.to) }

func spanOf(x *record) span {
	a := &x.activity
	return span{a.begin, a.begin.Add(time.Duration(a.bins[len(a.bins)-1].at+1) * a.width)}
}

// place returns where a bin stands.
func (s *series) place(b *bin, in span) (x, w float64) {
	from := s.begin.Add(time.Duration(b.at) * s.width)
	x = in.x(from)
	w = in.x(from.Add(s.width)) - x
	return round(x + w*0.06), round(max(w*0.88, 0.6))
}

func (s *series) when(b *bin) string {
	from := s.begin.Add(time.Duration(b.at) * s.width)
	return fmt.Sprintf("%s, %s", from.UTC().Format("2006-01-02 15:04:05")+" UTC", length(s.width))
}

// length says how long a bin is.
func length(d time.Duration) string {
	switch {
	case d >= 24*time.Hour:
		return fmt.Sprintf("%d d", d/(24*time.Hour))
	case d >= time.Hour:
		return fmt.Sprintf("%d h", d/time.Hour)
	case d >= time.Minute:
		return fmt.Sprintf("%d min", d/time.Minute)
	}
	return fmt.Sprintf("%d s", d/time.Second)
}

// activity draws how many actions there were.
func activity(x *record) *chart {
	s := &x.activity
	if len(s.bins) == 0 {
		return nil
	}
	in := spanOf(x)
	most := 0.0
	for i := range s.bins {
		most = max(most, s.bins[i].sum[0]+s.bins[i].sum[1]+s.bins[i].sum[2])
	}
	c := &chart{Top: fmt.Sprintf("%s in %s", count(int(most)), length(s.width)), Lines: []float64{50}}
	c.From, c.To = in.labels()
	c.Label = fmt.Sprintf("Actions over time, from %s to %s: at most %d in %s", c.From, c.To, int(most), length(s.width))
	for i := range s.bins {
		b := &s.bins[i]
		at, w := s.place(b, in)
		y := 100.0
		title := fmt.Sprintf("%s: %.0f permitted, %.0f refused", s.when(b), b.sum[0], b.sum[1])
		if b.sum[2] > 0 {
			c.Events = true
			title += fmt.Sprintf(", %.0f events", b.sum[2])
		}
		for k, class := range []string{"permit", "deny", "event"} {
			if b.sum[k] == 0 {
				continue
			}
			h := round(max(96*b.sum[k]/most, 1))
			y -= h
			c.Bars = append(c.Bars, bar{at, round(y), w, h, class, title})
		}
	}
	return c
}

// usage draws what was used of a limit: the highest value that an entry states in each stretch of time.
func usage(l *limit, x *record) *chart {
	in := spanOf(x)
	c := &chart{Top: "100 %", Lines: []float64{4, 52}}
	c.From, c.To = in.labels()
	c.Label = fmt.Sprintf("Use of %s %s over time: at most %.0f %%", l.rule, clip(l.key), l.peak*100)
	for i := range l.bins {
		b := &l.bins[i]
		at, w := l.place(b, in)
		class := "use"
		if b.high >= 0.8 {
			class = "use near"
		}
		h := round(max(96*min(b.high, 1), 0.8))
		c.Bars = append(c.Bars, bar{at, 100 - h, w, h, class, fmt.Sprintf("%s: at most %.0f %%", l.when(b), b.high*100)})
	}
	return c
}

// maxDrawn bounds the certificates of a drawing.
const maxDrawn = 60

// life draws the lives of certificates, and when the host was attested for each.
func life(list []*certificate) *chart {
	if len(list) == 0 {
		return nil
	}
	list = list[max(len(list)-maxDrawn, 0):]
	in := span{list[0].action.Certificate.NotBefore, list[0].action.Certificate.NotAfter}
	for _, c := range list {
		for _, t := range []time.Time{c.action.Certificate.NotBefore, c.action.Attestation.Time} {
			if t.Before(in.from) {
				in.from = t
			}
		}
		if t := c.action.Certificate.NotAfter; t.After(in.to) {
			in.to = t
		}
	}
	c := &chart{}
	c.From, c.To = in.labels()
	c.Label = fmt.Sprintf("Lives of %d certificates, and when the host was attested for each, from %s to %s", len(list), c.From, c.To)
	for i, x := range list {
		crt := x.action.Certificate
		at, y := in.x(crt.NotBefore), 12.0+float64(i%2)*42
		c.Bars = append(c.Bars,
			bar{round(at), y, round(max(in.x(crt.NotAfter)-at, 1)), 34, "life", fmt.Sprintf("certificate %s: %s to %s", crt.SerialNumber.Text(16), minute(crt.NotBefore), minute(crt.NotAfter))},
			bar{round(min(in.x(x.action.Attestation.Time), 997)), y - 6, 3, 46, "attested", "attested " + minute(x.action.Attestation.Time)})
	}
	return c
}
