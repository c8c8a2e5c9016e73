package scope

import "inkan/internal/strictjson"

// CancelsOnly returns the scope with nothing left to do but cancels: the same
// venues, times, process and sources, and no other action.
func (s *Scope) CancelsOnly() (*Scope, error) {
	d := s.doc
	d.Actions = []Kind{OrderCancel, OrderMassCancel}
	b, err := strictjson.Marshal(d)
	if err != nil {
		return nil, err
	}
	return Parse(b)
}

// BoundsOverTime says whether the scope limits how much, or how many orders,
// may be sent in a window.
func (s *Scope) BoundsOverTime() bool {
	return len(s.doc.NotionalWindows) > 0 || len(s.doc.OrderWindows) > 0
}

// IsCancel says whether the action is a cancel, which only reduces risk (rule G7).
func (a *Action) IsCancel() bool { return a.Kind.reducesRisk() }
