package verify

// Known is how many headers a receiver remembers.
func (r *Receiver) Known() int {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return len(r.known)
}
