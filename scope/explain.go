package scope

// Explain returns every limit over time that refuses one more use, in the order
// of [Book.Check]; none if it is allowed.
func (b *Book) Explain(s *Scope, u Use) []*Refusal {
	first := b.Check(s, u)
	if first == nil {
		return nil
	}
	all := []*Refusal{first}
	c := b.resolve(&u)
	for i := range s.limits {
		l := &s.limits[i]
		key, ok := l.applies(s, &u)
		if !ok {
			continue
		}
		if r := b.refuses(l, key, &c); r != nil && r.Message != first.Message {
			all = append(all, r)
		}
	}
	return all
}
